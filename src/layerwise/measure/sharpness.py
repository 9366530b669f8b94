"""Sharpness: the steepest curvature of the loss by a layer's weights."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import measure


@measure(Paper("A Model Zoo on Phase Transitions in Neural Networks", 2025, "2504.18072"))
def sharpness(
    weight: Float[Tensor, "out in"],
    hessian: Callable[[Any], Any],
    *,
    steps: int = 30,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> float:
    """Score a layer by the top eigenvalue of the loss's Hessian by its weights.

    Lanczos's method from a random start: the products H v with the layer's own block H of the
    Hessian span a space in which H is a small tridiagonal matrix, whose largest eigenvalue comes
    up to that of H.  It ends after `steps` products, or once the value moves by less than
    `tolerance` of itself.

    Unlike the official code, which iterates v <- H v and so finds the eigenvalue that is largest
    in size, whatever its sign, and turns round where the largest is below zero, this finds the
    largest itself.  The zoo takes the Hessian by all weights of a network; here it is that of one
    layer's, which is a block on its diagonal: the largest eigenvalue of any layer is at most that
    of the network.

    Args:
        weight: The layer.
        hessian: The product of the Hessian with a direction, both (out, in).
        steps: Most products.
        tolerance: Least relative change to go on for.
        seed: Of the random start.

    Returns:
        Eigenvalue, in nats per squared unit of weight; higher is more important.

    Raises:
        UserError: `steps` is below 1.
    """
    if steps < 1:
        raise UserError(f"{steps} products are asked for.", "Give 1 or more.")
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    found: list[Tensor] = [start / start.norm()]
    slopes: list[float] = []
    joints: list[float] = []
    top = 0.0
    for _ in range(min(steps, weight.numel())):
        turned = hessian(found[-1].float()).double()
        slopes.append(float((turned * found[-1]).sum()))
        before, top = top, _largest(slopes, joints)
        for _ in range(2):  # once more takes away what rounding left of those before
            for known in found:
                turned = turned - (turned * known).sum() * known
        left = float(turned.norm())
        settled = len(slopes) > 1 and abs(top - before) <= tolerance * abs(top)
        # Nothing new is left once the space is closed, but for rounding.
        if settled or left <= 1e-6 * max(map(abs, slopes), default=0.0):
            break
        joints.append(left)
        found.append(turned / left)
    return top


def _largest(slopes: list[float], joints: list[float]) -> float:
    """The largest eigenvalue of a tridiagonal matrix, by its diagonal and what is beside it."""
    beside = torch.tensor(joints[: len(slopes) - 1], dtype=torch.float64)
    matrix = torch.tensor(slopes, dtype=torch.float64).diag() + beside.diag(1) + beside.diag(-1)
    return float(torch.linalg.eigvalsh(matrix)[-1])
