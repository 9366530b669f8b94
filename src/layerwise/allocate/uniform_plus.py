"""Uniform+: the same for every item, but for the two ends of the model."""

import bisect
import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor

from layerwise.allocate._budget import check_budget, spent
from layerwise.core.catalogue import Claim, Paper
from layerwise.core.verbs import allocator

# One weight of so many is the least that the last layer keeps.
_FIFTH = 5


@allocator(
    Paper("The State of Sparsity in Deep Neural Networks", 2019, "1902.09574"),
    claims=(
        Claim(
            "uniform",
            "digits-mlp/prune",
            {"density": 0.1},
            0.05,
            "section 5: a dense first convolution and a fifth of the last layer beat uniform",
        ),
    ),
    nested=True,
)
def uniform_plus(
    shapes: Sequence[tuple[int, ...]], costs: Sequence[Int[Tensor, " _"]], *, budget: int
) -> Int[Tensor, " items"]:
    """Give all items one level, but spare the first convolution and a fifth of the last layer.

        density_i = d                 in between
        density_1 = 1                 if the first item is a convolution
        density_L = max(d, 1/5)

    with the highest common d that the budget pays for.  The first and the last item are those of
    the order given; only a shape of four sides is a convolution, as in LAMP's baselines
    (arXiv 2010.07611).

    Unlike there, a budget too small for the exceptions is not refused: the first item, then the
    last one, gets what the budget pays for with all others at their first level.

    Args:
        shapes: Shape of each item's weight, in the order of the model.
        costs: One tensor per item, ascending: how many weights each level keeps.
        budget: How many weights all items together may keep.

    Returns:
        Index of each item's level.

    Raises:
        UserError: The first levels together keep more than the budget.
    """
    check_budget(costs, budget)
    least = [0] * len(costs)
    for item, level in _spared(shapes, costs):
        room = budget - spent(costs, least) + int(costs[item][least[item]])
        affordable = bisect.bisect_right(cast("list[int]", costs[item].tolist()), room) - 1
        least[item] = max(least[item], min(level, affordable))
        # The next exception is not made while this one is not paid for.
        if least[item] < level:
            break

    def at(common: int) -> list[int]:
        return [
            max(level, min(common, len(cost) - 1)) for level, cost in zip(least, costs, strict=True)
        ]

    highest = max(map(len, costs), default=1)
    above = bisect.bisect_right(range(highest), budget, key=lambda common: spent(costs, at(common)))
    return torch.tensor(at(above - 1), dtype=torch.int64)


def _spared(
    shapes: Sequence[tuple[int, ...]], costs: Sequence[Int[Tensor, " _"]]
) -> Iterator[tuple[int, int]]:
    """Items that keep more than the others, and the level that they are to have at least."""
    if shapes and len(shapes[0]) == 4:
        yield 0, len(costs[0]) - 1
    if shapes:
        last = len(shapes) - 1
        reached = (_FIFTH * costs[last] >= math.prod(shapes[last])).nonzero()  # (levels, 1)
        yield last, int(reached[0]) if len(reached) else len(costs[last]) - 1
