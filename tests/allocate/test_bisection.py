import itertools

import torch

from layerwise.allocate.bisection import bisection

COSTS = [torch.tensor(cost) for cost in ([2, 3, 5], [10, 20, 40], [5, 7, 8])]
ERRORS = [torch.tensor(error) for error in ([3.0, 1.0, 0.0], [9.0, 2.0, 0.0], [1.0, 0.5, -1.0])]


def _spent(levels):
    return sum(int(cost[level]) for cost, level in zip(COSTS, levels, strict=True))


def test_lowers_the_shortest_part_of_the_order_that_fits():
    # Lost for each byte saved, from the last level: 1/2, 2/20, 1.5/1; from the second: 2, 0.7, 1/4.
    chain = [[2, 2, 2], [2, 1, 2], [1, 1, 2], [1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]
    for budget in range(_spent(chain[-1]), 60):
        expected = next(levels for levels in chain if _spent(levels) <= budget)
        assert bisection(ERRORS, COSTS, budget=budget).tolist() == expected


def test_a_layer_that_gains_from_being_lowered_goes_first():
    errors = [torch.tensor([0.1, 0.0]), torch.tensor([-0.5, 0.0]), torch.tensor([0.2, 0.0])]
    assert bisection(errors, [torch.tensor([1, 2])] * 3, budget=5).tolist() == [1, 0, 1]


def test_what_saves_nothing_comes_last():
    errors = [torch.tensor([0.0, 0.0]), torch.tensor([5.0, 0.0])]
    costs = [torch.tensor([4, 4]), torch.tensor([1, 2])]
    assert bisection(errors, costs, budget=5).tolist() == [1, 0]


def test_an_item_with_fewer_levels_waits():
    errors = [torch.tensor([1.0, 0.5, 0.1]), torch.tensor([1.0, 0.0])]
    costs = [torch.tensor([1, 2, 3]), torch.tensor([1, 2])]
    plans = [bisection(errors, costs, budget=budget).tolist() for budget in range(2, 6)]
    assert plans == [[0, 0], [0, 1], [1, 1], [2, 1]]
    assert all(
        a >= b
        for more, less in itertools.pairwise(plans[::-1])
        for a, b in zip(more, less, strict=True)
    )


def test_nothing_to_allocate_costs_nothing():
    assert bisection([], [], budget=0).tolist() == []
