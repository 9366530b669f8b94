"""The least total error that a budget can buy, exactly."""

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import optimize, sparse
from torch import Tensor

from layerwise.allocate._budget import common_levels, spent
from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import allocator

# The solver calls two plans equal when their errors differ by less than 1e-6; with the best
# known plan at this much, that is a millionth of a millionth of it.
_SCALE = 1e6


# Not in the paper: there is no network in it.  It is what layerwise says of this allocator.
_SOURCE = "ours: error curves beat one score and two levels"


@allocator(
    Paper("The Multiple-Choice Knapsack Problem", 1979),
    claims=(
        Claim("threshold", "stories-char-940k/allocate", {"budget": "4bits"}, 0.1, _SOURCE),
        Claim("threshold", "builtin-tiny/allocate", {"budget": "3.2bits"}, 0.1, _SOURCE),
    ),
)
def knapsack(
    errors: Sequence[Float[Tensor, " _"]], costs: Sequence[Int[Tensor, " _"]], *, budget: int
) -> Int[Tensor, " items"]:
    """Choose one level per item so that the errors add up to the least the budget allows.

    With x_il = 1 where item i gets level l:

        minimize    sum_il error_il x_il
        subject to  sum_il cost_il x_il <= budget ,   sum_l x_il = 1 ,   x_il in {0, 1}

    This is Sinha and Zoltners' problem, solved to optimality by the branch and bound of HiGHS.  Its
    tolerances are absolute, so errors are given to it as a fraction of the best plan known,
    first the uniform one; levels whose error alone is above that are left out.  The cost of its
    answer is counted in integers, and an answer that costs too much is solved again with that
    much less to spend.  Among levels of one item with equal errors the cheapest is chosen.

    Args:
        errors: One tensor per item: the error at each level, in a unit all items share.
        costs: One tensor per item, ascending: what each level costs.
        budget: What all items together may cost.

    Returns:
        Index of each item's level.

    Raises:
        UserError: The first levels together cost more than the budget, or an error is not a
            finite number.
    """
    levels = common_levels(costs, budget)
    curves = [error.double() for error in errors]
    for item, curve in enumerate(curves):
        if not curve.isfinite().all():
            raise UserError(
                f"item {item} has the errors {curve.tolist()}.", "Give a finite error per level."
            )
    excess = [(curve - curve.min()).numpy() for curve in curves]

    def total(chosen: Sequence[int]) -> float:
        return math.fsum(float(row[level]) for row, level in zip(excess, chosen, strict=True))

    known = total(levels)
    while known > 0:
        found = _solve(excess, costs, budget, known)
        best = min(total(found), known)
        levels = found if best < known else levels
        if best > known / 1000:
            break
        known = best
    cheapest = [
        int((curve <= curve[level]).nonzero()[0])
        for curve, level in zip(curves, levels, strict=True)
    ]
    return torch.tensor(cheapest, dtype=torch.int64)


def _solve(
    excess: Sequence[np.ndarray[Any, np.dtype[np.float64]]],
    costs: Sequence[Int[Tensor, " _"]],
    budget: int,
    known: float,
) -> list[int]:
    """The best levels, when some plan is known whose excess errors add up to `known`."""
    rows = [cost.numpy() for cost in costs]
    # In the largest unit that divides them all, costs are the smallest the solver can be given.
    unit = max(math.gcd(*(int(cost) - int(row[0]) for row in rows for cost in row)), 1)
    room = budget - sum(int(row[0]) for row in rows)
    choices = [
        (item, level)
        for item, row in enumerate(excess)
        for level in range(len(row))
        if row[level] <= known
    ]
    error = [float(excess[item][level]) / known * _SCALE for item, level in choices]
    cost = [(int(rows[item][level]) - int(rows[item][0])) // unit for item, level in choices]
    owner = [item for item, _ in choices]
    one_each = sparse.csr_array((np.ones(len(choices)), (owner, range(len(choices)))))
    while True:
        answer = cast(
            Any,
            optimize.milp(
                error,
                integrality=1,
                bounds=optimize.Bounds(0, 1),
                constraints=[
                    optimize.LinearConstraint(one_each, 1, 1),
                    optimize.LinearConstraint(np.array([cost]), ub=room // unit),
                ],
                options={"mip_rel_gap": 0.0},
            ),
        )
        assert answer.success, answer.message
        levels = [level for (_, level), x in zip(choices, answer.x, strict=True) if x > 0.5]
        over = spent(costs, levels) - budget
        if over <= 0:
            return levels
        room -= over
