import torch

from layerwise.allocate.uniform import uniform

COSTS = [torch.tensor(cost) for cost in ([2, 3, 4], [10, 20, 40], [5, 7])]


def test_takes_the_highest_level_that_fits_everywhere():
    spent = {0: 17, 1: 30, 2: 51}
    for budget in range(17, 60):
        highest = max(index for index, cost in spent.items() if cost <= budget)
        expected = [highest, highest, min(highest, 1)]
        assert uniform(COSTS, budget=budget).tolist() == expected


def test_nothing_to_allocate_costs_nothing():
    assert uniform([], budget=0).tolist() == []
