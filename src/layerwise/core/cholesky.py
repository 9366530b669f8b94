"""The triangular factor of the inputs' second moments, damped until there is one."""

import math
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.statistics import check_statistics

# Dampings to try, each ten times the last.
_TRIES = 8


@dataclass(frozen=True, slots=True)
class Root:
    """What is needed to let inputs make up for each other, from the first to the last.

    Attributes:
        factor: R, upper triangular, float64: R R^T = H, the damped second moments.
        dead: Inputs that were always zero; alone on H's diagonal, they take and pass on nothing.
        notes: Where damping was raised.
    """

    factor: Float[Tensor, "in in"]
    dead: Bool[Tensor, " in"]
    notes: tuple[str, ...]


def upper_root(
    gram: Float[Tensor, "in in"], damping: float, order: Int64[Tensor, " in"] | None = None
) -> Root:
    """R of H = gram + damping * mean(diag gram over live inputs) * I.

    It takes in^3 / 3 products; H is never inverted.

    Args:
        gram: Mean of x x^T over calibration tokens.
        damping: Added to the diagonal, as a fraction of its mean; ten times more, and a note, as
            often as H does not factor.
        order: Of the inputs in R; as they come if it is not given.  `dead` is in that order too.

    Raises:
        UserError: The damping is no positive number, a value is NaN or infinite, or H does not
            factor.
    """
    if not 0 < damping < math.inf:
        raise UserError(f"damping is {damping}.", "Give a finite damping above 0.")
    check_statistics(gram)
    if order is not None:
        gram = gram[order][:, order]
    diagonal = gram.diagonal().double()
    dead = diagonal <= 0
    energy = 1.0 if bool(dead.all()) else float(diagonal[~dead].mean())
    # Reversing both axes turns the lower factor L L^T into the upper one, R R^T.
    damped = gram.flip(0, 1).double()
    diagonal = diagonal.masked_fill(dead, energy).flip(0)
    for power in range(_TRIES):
        used = damping * 10**power
        damped.diagonal().copy_(diagonal + used * energy)
        lower, failed = cast("tuple[Tensor, Tensor]", torch.linalg.cholesky_ex(damped))
        if not failed:
            raised = f"damping raised to {used:g}, for a gram matrix not positive definite"
            return Root(lower.flip(0, 1), dead, (raised,) if power else ())
    raise UserError(
        f"the gram matrix does not factor, even with damping {damping * 10 ** (_TRIES - 1):g}.",
        "Give a higher damping, or use a method that reads no gram matrix.",
    )
