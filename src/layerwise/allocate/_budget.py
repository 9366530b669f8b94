"""What every allocator must know of its budget: what is spent, and what can be."""

import bisect
import itertools
from collections.abc import Iterable, Sequence

from jaxtyping import Int
from torch import Tensor

from layerwise.core.errors import UserError


def spent(costs: Sequence[Int[Tensor, " _"]], levels: Iterable[int]) -> int:
    """Cost of one level per item."""
    return sum(int(cost[level]) for cost, level in zip(costs, levels, strict=True))


def check_budget(costs: Sequence[Int[Tensor, " _"]], budget: int) -> None:
    """Refuse a budget that no plan can keep.

    Raises:
        UserError: The first levels together cost more than the budget.
    """
    least = spent(costs, itertools.repeat(0, len(costs)))
    if budget < least:
        raise UserError(
            f"a budget of {budget} is too small: the least that can be spent is {least}.",
            f"Give at least {least}, or allow cheaper levels.",
        )


def common_levels(costs: Sequence[Int[Tensor, " _"]], budget: int) -> list[int]:
    """The highest level that every item can have at once; an item with fewer has its last.

    Raises:
        UserError: The first levels together cost more than the budget.
    """
    check_budget(costs, budget)

    def at(index: int) -> list[int]:
        return [min(index, len(cost) - 1) for cost in costs]

    highest = max((len(cost) for cost in costs), default=1)
    above = bisect.bisect_right(range(highest), budget, key=lambda index: spent(costs, at(index)))
    return at(above - 1)
