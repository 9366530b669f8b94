"""The triangular factor of the inputs' second moments, damped until there is one."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.statistics import check_statistics

# Dampings to try, each ten times the last.
_TRIES = 8
# Rows that are moved in one go.
_PANEL = 256


@dataclass(frozen=True, slots=True)
class Root:
    """What is needed to let inputs make up for each other, from the first to the last.

    Attributes:
        factor: R, upper triangular: R R^T = H, the damped second moments.
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

    It takes in^3 / 3 products and the memory of R; H is never inverted.  R is found in the dtype
    of `gram`, and in float64 where that fails.  It is the factor of a matrix whose entries differ
    from those of H by no more than some rounding errors of sqrt(H_ii H_jj) (Higham, Accuracy and
    Stability of Numerical Algorithms, theorem 10.3), as those of a sum of float32 products do.

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
    diagonal = diagonal.masked_fill(dead, energy)
    for power in range(_TRIES):
        used = damping * 10**power
        raised = f"damping raised to {used:g}, for a gram matrix not positive definite"
        for dtype in dict.fromkeys((gram.dtype, torch.float64)):
            damped = gram.to(dtype, copy=True)
            damped.diagonal().copy_(diagonal + used * energy)
            if _factor(damped):
                return Root(damped, dead, (raised,) if power else ())
    raise UserError(
        f"the gram matrix does not factor, even with damping {damping * 10 ** (_TRIES - 1):g}.",
        "Give a higher damping, or use a method that reads no gram matrix.",
    )


def _factor(matrix: Float[Tensor, "n n"]) -> bool:
    """Make a matrix its upper factor R, in place; whether it has one."""
    # Reversing both axes turns R R^T into L L^T.  Read by columns, L is the upper factor of U^T U.
    _reverse(matrix)
    failed = torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(matrix.T, upper=True, out=(matrix.T, failed))
    _reverse(matrix)
    return not failed


def _reverse(matrix: Float[Tensor, "n n"]) -> None:
    """Reverse both axes, in place."""
    count = len(matrix)
    for first in range(0, (count + 1) // 2, _PANEL):
        last = min(first + _PANEL, (count + 1) // 2)
        above, below = slice(first, last), slice(count - last, count - first)
        kept = matrix[above].flip(0, 1)
        matrix[above] = matrix[below].flip(0, 1)
        matrix[below] = kept
