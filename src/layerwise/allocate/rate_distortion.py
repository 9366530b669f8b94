"""The least total distortion, item after item, by dynamic programming over what is spent."""

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerwise.allocate._budget import common_levels, spent
from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import allocator

_SOURCE = "abstract: outperforms LAMP and uniform sparsity, ResNet-32 on CIFAR-10 at 95.5%"

_Row = np.ndarray[Any, np.dtype[np.float64]]


@allocator(
    Paper("Efficient Joint Optimization of Layer-Adaptive Weight Pruning", 2023, "2308.10438"),
    claims=(
        Claim("uniform", "stories-char-940k/allocate", {"density": 0.5}, 0.1, _SOURCE),
        Claim("uniform", "reference-6m/allocate", {"density": 0.5}, 0.1, _SOURCE),
        Claim("lamp", "stories-char-940k/allocate", {"density": 0.5}, 0.05, _SOURCE),
    ),
)
def rate_distortion(
    errors: Sequence[Float[Tensor, " _"]],
    costs: Sequence[Int[Tensor, " _"]],
    *,
    budget: int,
    bins: int = 4000,
) -> Int[Tensor, " items"]:
    """Choose levels whose errors, added up, are the least, one item after another.

    The change of a network's output when several layers are changed is close to the sum of the
    changes when each is changed alone.  With J_i(b) the least error of the first i items that cost
    no more than b,

        J_0(b) = 0 ,   J_i(b) = min_l  error_il + J_i-1(b - cost_il)

    and the levels are read back from J at the budget.  It is exact whatever the curves' shape.

    What a budget leaves above the first levels is counted in `bins` steps, costs rounded up, so
    that the table stays small; with as many bins as bytes nothing is rounded.  What rounding left
    over then pays for the steps that save the most error a byte, and the result is never worse
    than the highest common level.  `allocate/knapsack` solves the same problem without steps.

    Unlike the paper, whose distortion is the squared change of the network's output with each
    layer pruned alone to every density, the curves are those of `--sensitivity`, of which `kl`
    comes closest; and no level empties a layer, since the first one always keeps something.

    Args:
        errors: One tensor per item: the error at each level, in a unit all items share.
        costs: One tensor per item, ascending: what each level costs.
        budget: What all items together may cost.
        bins: Steps that the budget is counted in.

    Returns:
        Index of each item's level.

    Raises:
        UserError: The first levels together cost more than the budget, an error is not a finite
            number, or there is no bin.
    """
    common = common_levels(costs, budget)
    if bins < 1:
        raise UserError(f"bins {bins} is no number of steps.", "Give 1 or more, such as 4000.")
    curves = [cast(_Row, error.double().numpy()) for error in errors]
    for item, curve in enumerate(curves):
        if not np.isfinite(curve).all():
            raise UserError(
                f"item {item} has the errors {curve.tolist()}.", "Give a finite error per level."
            )

    def total(chosen: Sequence[int]) -> float:
        return math.fsum(float(row[level]) for row, level in zip(curves, chosen, strict=True))

    room = budget - spent(costs, [0] * len(costs))
    unit = max(-(-room // bins), 1)
    levels = _least(curves, [-(-(c - c[0]) // unit) for c in costs], room // unit)
    levels = _filled(curves, costs, levels, budget)
    return torch.tensor(min(levels, common, key=total), dtype=torch.int64)


def _least(curves: Sequence[_Row], costs: Sequence[Int[Tensor, " _"]], room: int) -> list[int]:
    """Levels of the least error that cost no more than `room`; the first ones cost nothing."""
    best = np.zeros(room + 1)
    chosen: list[Any] = []
    for curve, cost in zip(curves, costs, strict=True):
        made = np.full((len(curve), room + 1), np.inf)  # (levels, room + 1)
        for level, price in enumerate(cost.tolist()):
            if price <= room:
                made[level, price:] = curve[level] + best[: room + 1 - price]
        chosen.append(made.argmin(axis=0).astype(np.int16))
        best = made.min(axis=0)
    levels: list[int] = []
    for taken, cost in zip(reversed(chosen), reversed(costs), strict=True):
        levels.append(int(taken[room]))
        room -= int(cost[levels[-1]])
    return levels[::-1]


def _filled(
    curves: Sequence[_Row], costs: Sequence[Int[Tensor, " _"]], levels: list[int], budget: int
) -> list[int]:
    """The same with what is left of the budget, spent where it saves the most error a byte."""
    left = budget - spent(costs, levels)
    while True:
        steps = [
            (float(row[at] - row[higher]) / max(int(cost[higher] - cost[at]), 1), -item, higher)
            for item, (row, cost, at) in enumerate(zip(curves, costs, levels, strict=True))
            for higher in range(at + 1, len(row))
            if row[higher] < row[at] and cost[higher] - cost[at] <= left
        ]
        if not steps:
            return levels
        _, place, higher = max(steps)
        left -= int(costs[-place][higher] - costs[-place][levels[-place]])
        levels[-place] = higher
