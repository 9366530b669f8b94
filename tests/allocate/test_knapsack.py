import itertools
import math

import pytest
import torch

from layerwise.allocate.knapsack import knapsack
from layerwise.core.errors import UserError


def _total(rows, levels):
    return sum(int(row[level]) for row, level in zip(rows, levels, strict=True))


def _error(rows, levels):
    return math.fsum(float(row[level]) for row, level in zip(rows, levels, strict=True))


def _least_error(errors, costs, budget):
    plans = itertools.product(*(range(len(row)) for row in costs))
    return min(_error(errors, plan) for plan in plans if _total(costs, plan) <= budget)


@pytest.mark.parametrize("spread", [0, 4, 8])
@pytest.mark.parametrize("size", [1, 1000, 10**10])
@pytest.mark.parametrize("exponent", [-12, -6, 0, 6])
def test_no_plan_within_the_budget_has_less_error(exponent, size, spread):
    noise = torch.Generator().manual_seed(exponent + 100 * spread)
    for lengths in ((2, 3, 4, 4, 3), (4, 1, 4, 4)):
        costs = [torch.randint(1, 20 * size, (n,), generator=noise).sort().values for n in lengths]
        errors = [
            torch.rand(n, generator=noise, dtype=torch.float64)
            * 10.0 ** (exponent - spread * float(torch.rand((), generator=noise)))
            for n in lengths
        ]
        least, most = _total(costs, [0] * len(costs)), _total(costs, [-1] * len(costs))
        for budget in (least, least + (most - least) // 3, (least + most) // 2, most):
            levels = knapsack(errors, costs, budget=budget).tolist()
            assert _total(costs, levels) <= budget
            best = _least_error(errors, costs, budget)
            assert _error(errors, levels) == pytest.approx(best, rel=1e-12, abs=0)


def test_spends_to_the_last_byte():
    costs = [torch.tensor([0, 10**8 + place]) for place in range(6)]
    errors = [torch.tensor([1.0 + place / 100, 0.0]) for place in range(6)]
    three = 3 * 10**8 + 3 + 4 + 5
    assert knapsack(errors, costs, budget=three).tolist() == [0, 0, 0, 1, 1, 1]
    assert knapsack(errors, costs, budget=three - 1).tolist() == [0, 0, 1, 0, 1, 1]


def test_of_equal_errors_the_cheapest_is_chosen():
    costs = [torch.tensor([1, 2, 3])] * 2
    errors = [torch.tensor([2.0, 1.0, 1.0]), torch.zeros(3)]
    assert knapsack(errors, costs, budget=6).tolist() == [1, 0]


def test_refuses_errors_that_are_no_numbers():
    with pytest.raises(UserError, match="item 1"):
        knapsack(
            [torch.ones(2), torch.tensor([torch.nan, 0.0])], [torch.tensor([1, 2])] * 2, budget=3
        )


def test_nothing_to_allocate_costs_nothing():
    assert knapsack([], [], budget=0).tolist() == []
