"""The loss on the way from one network to another."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.errors import UserError


def over_the_ends(path: Float[Tensor, " points"], ends: Float[Tensor, " two"]) -> float:
    """How far the loss on the way rises above the line between two networks' own.

    Args:
        path: Mean loss at evenly spaced points, the ends of the way included.
        ends: Mean loss of the networks.

    Raises:
        UserError: There is no point between the ends.
    """
    if len(path) < 3:
        raise UserError(
            f"a way of {len(path)} points has none between its ends.", "Give 3 points or more."
        )
    gone = torch.linspace(0, 1, len(path), dtype=torch.float64)[1:-1]
    line = ends[0].double().lerp(ends[1].double(), gone)  # (points,)
    return float((path[1:-1].double() - line).max())


def over_the_curve(losses: Sequence[float]) -> float:
    """How far the loss on a curve departs most from the mean of its ends: below 0 where it rises.

    (L(0) + L(1)) / 2 - L(t*) ,   t* = argmax over t of |L(t) - (L(0) + L(1)) / 2|
    """
    level = (losses[0] + losses[-1]) / 2
    return max((level - one for one in losses), key=abs)
