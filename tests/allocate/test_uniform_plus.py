import math

import pytest
import torch

from layerwise.allocate.uniform import uniform
from layerwise.allocate.uniform_plus import uniform_plus

CONVOLUTION, INNER, LAST = (16, 3, 3, 3), (64, 144), (10, 64)


def _costs(shapes):
    return [(torch.arange(1, 101) * math.prod(shape)) // 100 for shape in shapes]


def _densities(shapes, density):
    budget = int(density * sum(map(math.prod, shapes)))
    levels = uniform_plus(shapes, _costs(shapes), budget=budget)
    return [(level + 1) / 100 for level in levels.tolist()]


def test_spares_the_first_convolution_and_a_fifth_of_the_last_layer():
    first, inner, last = _densities([CONVOLUTION, INNER, LAST], 0.1)
    assert (first, last) == (1.0, 0.2)
    left = 0.1 * (432 + 9216 + 640) - 432 - 128
    assert left / 9216 - 0.01 < inner <= left / 9216


def test_the_last_layer_goes_with_the_others_where_they_keep_more():
    _, inner, last = _densities([CONVOLUTION, INNER, LAST], 0.6)
    assert inner == last < 0.6


def test_is_uniform_where_there_is_nothing_to_spare():
    shapes = [INNER, INNER, LAST]
    for density in (0.25, 0.5, 1.0):
        budget = int(density * sum(map(math.prod, shapes)))
        expected = uniform(_costs(shapes), budget=budget)
        assert torch.equal(uniform_plus(shapes, _costs(shapes), budget=budget), expected)


@pytest.mark.parametrize("budget", range(103, 700, 13))
def test_a_small_budget_pays_for_the_first_exception_first(budget):
    shapes = [CONVOLUTION, INNER, LAST]
    costs = _costs(shapes)
    levels = uniform_plus(shapes, costs, budget=budget).tolist()
    assert sum(int(c[level]) for c, level in zip(costs, levels, strict=True)) <= budget
    assert levels[0] == 99 or levels[1:] == [0, 0]


def test_nothing_to_allocate_costs_nothing():
    assert uniform_plus([], [], budget=0).tolist() == []
