"""How alike two rankings are."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from scipy import stats


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, equal values at the mean of their ranks.

    The linear correlation of the ranks, from -1 (the other way round) over 0 to 1 (the same).

    Args:
        first: One figure for each thing.
        second: Another figure for each.

    Returns:
        None where all are alike on one side, or a figure is NaN: then there is no ranking.
    """
    sides = (first, second)
    if any(len(set(side)) < 2 or any(map(math.isnan, side)) for side in sides):
        return None
    found = cast(Any, stats.spearmanr(first, second))
    return float(found.statistic)


def agreement(
    columns: Mapping[str, Mapping[str, float]],
) -> dict[str, dict[str, float | None]]:
    """The rank correlation of each two of some figures, over the layers that both have.

    Args:
        columns: Figures, by their name and then by layer.
    """
    made: dict[str, dict[str, float | None]] = {name: {} for name in columns}
    for name, first in columns.items():
        for other, second in columns.items():
            if name in made[other]:
                made[name][other] = made[other][name]
                continue
            shared = [layer for layer in first if layer in second]
            made[name][other] = rank_correlation(
                [first[layer] for layer in shared], [second[layer] for layer in shared]
            )
    return made
