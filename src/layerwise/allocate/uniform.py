"""The same for every item: the baseline every other allocator is measured against."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from layerwise.allocate._budget import common_levels
from layerwise.core.catalogue import Paper
from layerwise.core.verbs import allocator


@allocator(Paper("To prune, or not to prune", 2017, "1710.01878"), nested=True)
def uniform(costs: Sequence[Int[Tensor, " _"]], *, budget: int) -> Int[Tensor, " items"]:
    """Give every item the highest level that all of them can have.

        level_i = min(k, levels of i - 1) ,   k the largest with sum_i cost_i(level_i) <= budget

    What is left over is not spent: it does not pay for one level more everywhere.

    Args:
        costs: One tensor per item, ascending: what each level costs.
        budget: What all items together may cost.

    Returns:
        Index of each item's level.

    Raises:
        UserError: The first levels together cost more than the budget.
    """
    return torch.tensor(common_levels(costs, budget), dtype=torch.int64)
