import itertools
import math

import pytest
import torch

from layerwise.allocate import knapsack as module
from layerwise.allocate.knapsack import knapsack
from layerwise.core.errors import UserError


def _total(rows, levels):
    return sum(int(row[level]) for row, level in zip(rows, levels, strict=True))


def _error(rows, levels):
    return math.fsum(float(row[level]) for row, level in zip(rows, levels, strict=True))


def _least_error(errors, costs, budget):
    plans = itertools.product(*(range(len(row)) for row in costs))
    return min(_error(errors, plan) for plan in plans if _total(costs, plan) <= budget)


@pytest.fixture(params=["lists", "solver"])
def way(request, monkeypatch):
    """Either way of looking for the best plan."""
    if request.param == "solver":
        monkeypatch.setattr(module, "_MOST_KEPT", 0)


@pytest.mark.usefixtures("way")
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


@pytest.mark.parametrize("size", [10**8, 10**10, 10**15])
def test_spends_to_the_last_byte(size):
    costs = [torch.tensor([0, size + place]) for place in range(6)]
    errors = [torch.tensor([1.0 + place / 100, 0.0]) for place in range(6)]
    three = 3 * size + 3 + 4 + 5
    assert knapsack(errors, costs, budget=three).tolist() == [0, 0, 0, 1, 1, 1]
    assert knapsack(errors, costs, budget=three - 1).tolist() == [0, 0, 1, 0, 1, 1]


def _model(items, levels, size, seed):
    """Layers of a few sizes, whose errors fall by about four for each bit."""
    noise = torch.Generator().manual_seed(seed)
    bits = torch.linspace(2, 8, levels, dtype=torch.float64)
    counts = torch.randint(1, 6, (items,), generator=noise) * size
    scales = torch.rand(items, generator=noise, dtype=torch.float64)
    bumps = 1 + torch.rand(items, levels, generator=noise, dtype=torch.float64) / 10
    costs = [(count * (bits + 0.25) / 8).long() for count in counts]
    errors = [scale * bump * 4.0**-bits for scale, bump in zip(scales, bumps, strict=True)]
    least, most = _total(costs, [0] * items), _total(costs, [-1] * items)
    return errors, costs, least + (most - least) // 3


def test_many_layers_with_many_levels():
    errors, costs, budget = _model(400, 12, 10_000, seed=0)
    levels = knapsack(errors, costs, budget=budget).tolist()
    assert _total(costs, levels) <= budget
    excess = [(row - row.min()).numpy() for row in errors]
    solved = module._solve(excess, costs, budget, _error(excess, levels) * 2)
    assert _total(costs, solved) <= budget
    # The solver's own gap is a millionth of a millionth.
    assert _error(excess, levels) <= _error(excess, solved) * (1 + 1e-11)


def test_lists_and_solver_agree_where_one_budget_has_many_plans():
    """Items that are alike: as many plans of one cost and one error as there are choices."""
    costs = [torch.tensor([1, 2, 4])] * 40
    errors = [torch.tensor([4.0, 2.5, 1.0], dtype=torch.float64)] * 40
    excess = [(row - row.min()).numpy() for row in errors]
    for budget in (41, 77, 100, 159):
        levels = knapsack(errors, costs, budget=budget).tolist()
        solved = module._solve(excess, costs, budget, 1000.0)
        assert _error(errors, levels) == pytest.approx(_error(errors, solved), rel=1e-12)


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
