"""One line for the whole model: an item has every level that lies at or below it."""

import bisect
from collections.abc import Sequence

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from layerwise.allocate._budget import spent


def highest_line(
    costs: Sequence[Int[Tensor, " _"]], heights: Sequence[Float64[Tensor, " _"]], budget: int
) -> list[int]:
    """Levels at the highest line that the budget pays for; at least the first of every item.

    Levels at one height are reached together or not at all, so that items alike are treated alike.

    Args:
        costs: One tensor per item, ascending.
        heights: One tensor per item, ascending: where each level lies.
        budget: In the unit of `costs`.
    """
    lines = torch.cat([*heights, torch.empty(0, dtype=torch.float64)]).unique()

    def under(number: int) -> list[int]:
        if not number:
            return [0] * len(costs)
        reached = [torch.searchsorted(height, lines[number - 1], right=True) for height in heights]
        return [max(int(count) - 1, 0) for count in reached]

    counts = range(len(lines) + 1)
    paid = bisect.bisect_right(counts, budget, key=lambda number: spent(costs, under(number)))
    return under(paid - 1)
