"""The least harmful part of an order is lowered; how long a part, halving finds."""

import bisect
import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerwise.allocate._budget import common_levels, spent
from layerwise.core.catalogue import Paper
from layerwise.core.verbs import allocator


@allocator(
    Paper(
        "Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training "
        "Quantization",
        2023,
        "2306.04879",
    ),
    nested=True,
)
def bisection(
    errors: Sequence[Float[Tensor, " _"]], costs: Sequence[Int[Tensor, " _"]], *, budget: int
) -> Int[Tensor, " items"]:
    """Lower the items that lose the least for what they save, as few as the budget asks for.

    From the highest level to the lowest, all items are lowered by one level before any is lowered
    by a second.  In the last such round, from level l + 1 to l, items o_1, o_2, ... come in the
    order of what a saved byte loses,

        (error_il - error_i,l+1) / (cost_i,l+1 - cost_il)

    and the smallest n is found by halving for which o_1 ... o_n lowered keep the budget.

    A target of quality is met the same way: with `--max-kl` the n is the largest whose measured KL
    keeps it, in log2(n + 1) + 1 trials over the rounds of all levels together.  Meant for errors
    that know of each other, `--sensitivity hessian`.

    Unlike the paper, whose rounds each stop short at the target by themselves, the next begins
    only where one has lowered all.  Items that save nothing come last, equal ones in the order of
    the items.

    Args:
        errors: One tensor per item: the error at each level, in a unit all items share.
        costs: One tensor per item, ascending: what each level costs.
        budget: What all items together may cost.

    Returns:
        Index of each item's level.

    Raises:
        UserError: The first levels together cost more than the budget.
    """
    levels = common_levels(costs, budget)
    above = [min(level + 1, len(cost) - 1) for level, cost in zip(levels, costs, strict=True)]
    saved = [
        int(cost[high] - cost[low]) for cost, low, high in zip(costs, levels, above, strict=True)
    ]
    lost = [
        float(error[low]) - float(error[high])
        for error, low, high in zip(errors, levels, above, strict=True)
    ]
    rates = [loss / less if less else math.inf for loss, less in zip(lost, saved, strict=True)]
    order = sorted(range(len(costs)), key=rates.__getitem__)
    freed = list(itertools.accumulate((saved[item] for item in order), initial=0))
    lowered = bisect.bisect_left(freed, spent(costs, above) - budget)
    for item in order[lowered:]:
        levels[item] = above[item]
    return torch.tensor(levels, dtype=torch.int64)
