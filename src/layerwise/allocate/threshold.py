"""Two neighbouring levels, and a score that says who gets the higher one."""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerwise.allocate._budget import common_levels
from layerwise.allocate._steps import climb
from layerwise.core.catalogue import Paper
from layerwise.core.verbs import allocator


@allocator(
    Paper(
        "Layer-Wise Quantization: A Pragmatic and Effective Method for Quantizing LLMs Beyond "
        "Integer Bit-Levels",
        2024,
        "2406.17415",
    ),
    nested=True,
)
def threshold(
    scores: Float[Tensor, " items"], costs: Sequence[Int[Tensor, " _"]], *, budget: int
) -> Int[Tensor, " items"]:
    """Raise the most important items by one level, as many as the budget pays for.

    Every item starts at the highest level that all can have.  In the order of their scores they
    are then raised to the next one, up to the first that no longer fits:

        average = (k low + (items - k) high) / items

    for items of one size, with the k least important at the low level; otherwise each counts
    by its cost.

    Unlike the paper, which is given its two levels, the budget picks them: the two uniform
    plans it lies between.  Equal scores are raised in the order of the items.

    Args:
        scores: Importance of each item; higher is more important.
        costs: One tensor per item, ascending: what each level costs.
        budget: What all items together may cost.

    Returns:
        Index of each item's level.

    Raises:
        UserError: The first levels together cost more than the budget.
    """
    base = common_levels(costs, budget)
    order = cast("list[int]", scores.argsort(descending=True, stable=True).tolist())
    steps = [item for item in order if base[item] + 1 < len(costs[item])]
    return torch.tensor(climb(costs, base, steps, budget), dtype=torch.int64)
