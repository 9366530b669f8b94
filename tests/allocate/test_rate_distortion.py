import itertools

import pytest
import torch

from layerwise.allocate.rate_distortion import rate_distortion
from layerwise.core.errors import UserError


def _total(rows, levels):
    return sum(float(row[level]) for row, level in zip(rows, levels, strict=True))


def _instance(seed, lengths, size):
    noise = torch.Generator().manual_seed(seed)
    costs = [torch.randint(1, size, (n,), generator=noise).sort().values for n in lengths]
    # Neither falling nor convex: curves that are measured are not, either.
    errors = [torch.rand(n, generator=noise, dtype=torch.float64) for n in lengths]
    return errors, costs


@pytest.mark.parametrize("seed", range(6))
def test_no_plan_within_the_budget_has_less_error(seed):
    errors, costs = _instance(seed, (2, 3, 4, 5), 300)
    least, most = (sum(int(cost[end]) for cost in costs) for end in (0, -1))
    for budget in (least, least + (most - least) // 4, (least + most) // 2, most):
        plans = itertools.product(*(range(len(cost)) for cost in costs))
        best = min(_total(errors, plan) for plan in plans if _total(costs, plan) <= budget)
        levels = rate_distortion(errors, costs, budget=budget).tolist()
        assert _total(costs, levels) <= budget
        assert _total(errors, levels) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("bins", [1, 7, 50, 4000])
def test_rounded_costs_never_break_the_budget(bins):
    costs = [torch.arange(1, 11) * size for size in (10**6 + 7, 3 * 10**6 + 1, 10**7 + 3)]
    errors = [weight / torch.arange(1.0, 11.0) for weight in (1.0, 5.0, 2.0)]
    budget = 10**8 // 2
    levels = rate_distortion(errors, costs, budget=budget, bins=bins).tolist()
    exact = min(
        _total(errors, plan)
        for plan in itertools.product(range(10), repeat=3)
        if _total(costs, plan) <= budget
    )
    assert _total(costs, levels) <= budget
    assert _total(errors, levels) <= exact * {1: 3, 7: 1.5, 50: 1.1, 4000: 1.001}[bins]


def test_a_level_that_saves_nothing_is_not_bought():
    errors, costs = [torch.tensor([1.0, 1.0, 0.5])], [torch.tensor([1, 2, 9])]
    assert rate_distortion(errors, costs, budget=8).tolist() == [0]


def test_refuses_what_is_no_number():
    costs = [torch.tensor([1, 2])]
    with pytest.raises(UserError, match="item 0 has the errors"):
        rate_distortion([torch.tensor([1.0, float("nan")])], costs, budget=2)
    with pytest.raises(UserError, match="bins 0"):
        rate_distortion([torch.tensor([1.0, 0.5])], costs, budget=2, bins=0)


def test_nothing_to_allocate_costs_nothing():
    assert rate_distortion([], [], budget=0).tolist() == []
