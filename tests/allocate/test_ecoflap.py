import pytest
import torch

import layerwise as lw
from layerwise.allocate.ecoflap import ecoflap
from layerwise.allocate.uniform import uniform
from layerwise.core.errors import UserError

SIZES = (1000, 4000, 2000, 500)
EVERY = [torch.arange(1, size + 1) for size in SIZES]


def _by_definition(scores, density, below):
    """The paper's loop: shares of what is left, full items taken out, until nothing is left."""
    budget = int(density * sum(SIZES))
    kept = [size * max(0.0, density - below) for size in SIZES]
    left = [float(score) for score in scores]
    for _ in range(1000):
        rest, total = budget - sum(kept), sum(left)
        if rest < 1e-9 or not total:
            break
        for n, size in enumerate(SIZES):
            kept[n] = min(size, kept[n] + left[n] / total * rest)
            left[n] = left[n] if kept[n] < size else 0.0
    return kept


@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("below", [0.05, 0.1, 0.3])
def test_keeps_what_the_loop_of_the_paper_keeps(density, below):
    scores = torch.tensor([3.0, 1.0, 2.0, 9.0])
    levels = ecoflap(scores, EVERY, budget=int(density * sum(SIZES)), below=below)
    expected = _by_definition(scores, density, below)
    for level, wanted in zip(levels.tolist(), expected, strict=True):
        assert level + 1 == pytest.approx(max(wanted, 1), abs=2.5)


def test_without_room_below_it_is_uniform():
    costs = [(torch.arange(1, 101) * size) // 100 for size in SIZES]
    scores = torch.tensor([3.0, 1.0, 2.0, 9.0])
    levels = ecoflap(scores, costs, budget=3000, below=0.0)
    assert torch.equal(levels, uniform(costs, budget=3000))


def test_without_any_score_it_is_uniform():
    costs = [(torch.arange(1, 101) * size) // 100 for size in SIZES]
    levels = ecoflap(torch.zeros(4), costs, budget=3000)
    assert torch.equal(levels, uniform(costs, budget=3000))


def test_an_item_without_a_score_keeps_its_floor():
    levels = ecoflap(torch.tensor([1.0, 1.0, 0.0, 1.0]), EVERY, budget=3750)
    assert levels[2] + 1 == 800


@pytest.mark.parametrize(
    ("scores", "options", "says"),
    [
        ([1.0, -0.5, 1.0, 1.0], {}, "a share of -0.5"),
        ([1.0, 0.5, 1.0, 1.0], {"below": -0.1}, "below -0.1"),
    ],
)
def test_refuses_what_cannot_be_shared(scores, options, says):
    with pytest.raises(UserError, match=says):
        ecoflap(torch.tensor(scores), EVERY, budget=3000, **options)


def test_nothing_to_allocate_costs_nothing():
    assert ecoflap(torch.zeros(0), [], budget=0).tolist() == []


def test_a_plan_goes_by_the_gradients_of_the_model(llama, text):
    plan = lw.plan(
        llama,
        density=0.5,
        allocate="ecoflap",
        measure="ecoflap",
        calibration=str(text),
        samples=2,
        length=16,
        cache=False,
    )
    layers = lw.open(llama).structure.layers
    scored = sorted(plan.layers.items(), key=lambda one: one[1].score / layers[one[0]].count)
    assert scored[0][1].density < scored[-1][1].density
    kept = sum(layers[name].count * one.density for name, one in plan.layers.items())
    assert kept <= 0.5 * sum(layer.count for layer in layers.values()) + len(layers)
