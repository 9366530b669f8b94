"""The least total error that a budget can buy, exactly."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
# Plans of some of the items that are kept at once; with more the solver is asked.
_MOST_KEPT = 1 << 16
# What sums of floats in another order can differ by, as a fraction of them.
_SUMS = 1e-12
# Where the search for how much the best plan regrets begins, as a fraction of what one is known to.
_FIRST_GAP = 2.0**-20

_Row = np.ndarray[Any, np.dtype[np.float64]]
_Whole = np.ndarray[Any, np.dtype[np.int64]]


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

    This is Sinha and Zoltners' problem.  At a price of lambda a byte, that at which the relaxed
    problem (x_il >= 0) spends the budget, no plan has less error than

        L = sum_i min_l (error_il + lambda cost_il) - lambda budget

    and a plan whose error is L + g has regrets r_il = error_il + lambda cost_il - min_l (...) that
    add up to g at most.  Item by item, plans of those so far are kept that regret g at most and
    that no other beats in both cost and error (Pisinger, "A minimal algorithm for the
    multiple-choice knapsack problem", 1995); g grows until a plan of all items is found, which is
    then the best.  Costs are integers throughout, whatever their size.

    Where too many plans are to be kept, branch and bound of HiGHS goes on.  Its tolerances are
    absolute, so errors are given to it as a fraction of the best plan known, first the uniform
    one; levels whose error alone is above that are left out.  The cost of its answer is counted in
    integers, and an answer that costs too much is solved again with that much less to spend.
    Among levels of one item with equal errors the cheapest is chosen.

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
    listed = _listed(excess, costs, budget, known) if known > 0 else levels
    if listed is not None:
        levels = min(levels, listed, key=total)
    while listed is None:
        found = _solve(excess, costs, budget, known)
        best = min(total(found), known)
        levels = found if best < known else levels
        if best > known / 1000 or best <= 0:
            break
        known = best
    cheapest = [
        int((curve <= curve[level]).nonzero()[0])
        for curve, level in zip(curves, levels, strict=True)
    ]
    return torch.tensor(cheapest, dtype=torch.int64)


def _listed(
    excess: Sequence[_Row], costs: Sequence[Int[Tensor, " _"]], budget: int, known: float
) -> list[int] | None:
    """The best levels, by lists of plans that none beats; None if those get too long.

    `known` is what the excess errors of some plan add up to.
    """
    spending = [(cost - cost[0]).numpy().astype(np.int64) for cost in costs]
    room = budget - spent(costs, [0] * len(costs))
    price = _price(excess, spending, room)
    priced = [row + price * cost for row, cost in zip(excess, spending, strict=True)]
    regrets = [row - row.min() for row in priced]
    least = math.fsum(float(row.min()) for row in priced) - price * room
    # Of sums this large, regrets are differences.
    slack = _SUMS * (known + price * room)
    gap = (known - least) * _FIRST_GAP
    while True:
        found = _within(excess, spending, regrets, room, gap + slack)
        if found is None:
            return None
        levels, error = found
        known = min(known, error)
        # What errs less than this regrets less than that.
        if levels and known - least <= gap:
            return levels
        gap = min(2 * gap, known - least) if known > least else slack


def _price(excess: Sequence[_Row], spending: Sequence[_Whole], room: int) -> float:
    """Error that the last byte saves, where levels can be mixed."""
    steps = sorted(
        (step for row, cost in zip(excess, spending, strict=True) for step in _hull(row, cost)),
        reverse=True,
    )
    left = room
    for saved, paid in steps:
        left -= paid
        if left < 0:
            return saved
    return 0.0


def _hull(excess: _Row, cost: _Whole) -> Iterator[tuple[float, int]]:
    """Error saved a byte, and bytes, of each step along an item's lower convex hull."""
    at = int(np.where(cost <= cost[0], excess, np.inf).argmin())
    while True:
        dearer = np.flatnonzero((cost > cost[at]) & (excess < excess[at]))
        if not len(dearer):
            return
        rates = (excess[at] - excess[dearer]) / (cost[dearer] - cost[at])
        after = int(dearer[rates == rates.max()][-1])
        yield float(rates.max()), int(cost[after] - cost[at])
        at = after


@dataclass(frozen=True, slots=True)
class _Kept:
    """Plans of the items so far: what they spend, regret and err."""

    cost: _Whole
    regret: _Row
    error: _Row


def _within(
    excess: Sequence[_Row],
    spending: Sequence[_Whole],
    regrets: Sequence[_Row],
    room: int,
    gap: float,
) -> tuple[list[int], float] | None:
    """The best levels of those that regret so much, and their error.

    No levels and infinity if there are none, None if there are too many.
    """
    offered = [np.flatnonzero(row <= gap) for row in regrets]
    # Items whose levels differ the most come first, so that lists stay short for longest.
    order = sorted(range(len(offered)), key=lambda item: -_second(regrets[item]))
    spare = [int(spending[item][offered[item]].min()) for item in order]
    rest = room - sum(spare)  # what is left over when all that follow spend the least
    now = _Kept(np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1))
    made: list[tuple[Any, Any]] = []
    for item, least in zip(order, spare, strict=True):
        levels = offered[item]
        if len(now.cost) * len(levels) > 8 * _MOST_KEPT:
            return None
        rest += least
        costs = (now.cost[:, None] + spending[item][levels]).ravel()
        regretted = (now.regret[:, None] + regrets[item][levels]).ravel()
        errors = (now.error[:, None] + excess[item][levels]).ravel()
        kept = _unbeaten(costs, errors, np.flatnonzero((costs <= rest) & (regretted <= gap)))
        if not len(kept):
            return [], math.inf
        if len(kept) > _MOST_KEPT:
            return None
        parent, level = np.divmod(kept, len(levels))
        made.append((parent.astype(np.int32), levels[level].astype(np.int16)))
        now = _Kept(costs[kept], regretted[kept], errors[kept])
    at = len(now.error) - 1
    error, chosen = float(now.error[at]), [0] * len(order)
    for item, (parent, level) in zip(reversed(order), reversed(made), strict=True):
        chosen[item] = int(level[at])
        at = int(parent[at])
    return chosen, error


def _second(regret: _Row) -> float:
    """The least regret of any other level than the best."""
    return float(np.partition(regret, 1)[1]) if len(regret) > 1 else math.inf


def _unbeaten(cost: _Whole, error: _Row, plans: _Whole) -> _Whole:
    """Those plans, by cost, that none as cheap errs as little as."""
    ordered = plans[np.lexsort((error[plans], cost[plans]))]
    errors = error[ordered]
    least = np.minimum.accumulate(errors)
    return ordered[np.append(True, errors[1:] < least[:-1])] if len(ordered) else ordered


def _solve(
    excess: Sequence[_Row], costs: Sequence[Int[Tensor, " _"]], budget: int, known: float
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
