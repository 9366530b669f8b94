import math

import pytest
import torch

from layerwise.allocate.erk import erk

SHAPES = [(64, 3, 3, 3), (128, 64, 3, 3), (300, 64), (100, 300), (10, 100)]
COUNTS = [math.prod(shape) for shape in SHAPES]
EVERY = [torch.arange(1, count + 1) for count in COUNTS]


def _by_definition(shapes, density):
    """Layers whose density would exceed 1 are frozen whole, the worst first, as in the paper."""
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    whole = set()
    while True:
        left = density * sum(sizes) - sum(sizes[n] for n in whole)
        scale = left / sum(raw[n] * sizes[n] for n in range(len(sizes)) if n not in whole)
        worst = max((n for n in range(len(sizes)) if n not in whole), key=raw.__getitem__)
        if scale * raw[worst] <= 1:
            return [1.0 if n in whole else scale * r for n, r in enumerate(raw)]
        whole.add(worst)


@pytest.mark.parametrize("density", [0.02, 0.1, 0.2, 0.5, 0.9])
def test_densities_are_those_of_the_paper(density):
    levels = erk(SHAPES, EVERY, budget=int(density * sum(COUNTS)))
    found = [int(cost[level]) for cost, level in zip(EVERY, levels, strict=True)]
    for kept, count, expected in zip(found, COUNTS, _by_definition(SHAPES, density), strict=True):
        assert kept / count == pytest.approx(expected, abs=1e-3)


def test_layers_alike_keep_the_same():
    shapes = [(20, 30)] * 3 + [(30, 20)]
    costs = [torch.arange(1, 601)] * 4
    levels = erk(shapes, costs, budget=1001)  # one more than four times 250
    assert levels.tolist() == [249] * 4


def test_spends_all_where_every_layer_is_kept_whole():
    assert erk(SHAPES, EVERY, budget=sum(COUNTS)).tolist() == [count - 1 for count in COUNTS]


def test_nothing_to_allocate_costs_nothing():
    assert erk([], [], budget=0).tolist() == []
