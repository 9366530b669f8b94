"""Buying levels one step at a time, the most wanted step of any item first."""

from collections.abc import Iterable, Sequence

from jaxtyping import Int
from torch import Tensor

from layerwise.allocate._budget import spent


def climb(
    costs: Sequence[Int[Tensor, " _"]], levels: list[int], steps: Iterable[int], budget: int
) -> list[int]:
    """Raise one item by one level per step, up to the first step that the budget cannot pay.

    Args:
        costs: One tensor per item, ascending.
        levels: Where every item starts.
        steps: The item to raise at each step, most wanted first.
        budget: In the unit of `costs`.
    """
    reached, left = list(levels), budget - spent(costs, levels)
    for item in steps:
        left -= int(costs[item][reached[item] + 1] - costs[item][reached[item]])
        # Stopping here, instead of looking for a smaller step, is what makes it a threshold:
        # no step is taken while one that is wanted more is not.
        if left < 0:
            break
        reached[item] += 1
    return reached
