import pytest
import torch

import layerwise as lw
from layerwise.allocate.stretch import stretch
from layerwise.allocate.uniform import uniform
from layerwise.core.errors import UserError

SCORES = torch.tensor([0.01, 0.05, 0.02, 0.03])


def _costs(*sizes):
    return [torch.arange(1, size + 1) for size in sizes]


def _densities(scores, sizes, density, **options):
    costs = _costs(*sizes)
    levels = stretch(scores, costs, budget=int(density * sum(sizes)), **options)
    return torch.tensor(
        [(int(level) + 1) / size for level, size in zip(levels, sizes, strict=True)]
    )


@pytest.mark.parametrize("spread", [0.05, 0.08, 0.15])
def test_equal_items_get_the_densities_of_the_paper(spread):
    found = _densities(SCORES, [100_000] * 4, 0.3, spread=spread)
    moved = (SCORES - SCORES.min()) / (SCORES.max() - SCORES.min()) * 2 * spread
    torch.testing.assert_close(found, moved - moved.mean() + 0.3, atol=2e-5, rtol=0)


def test_importances_of_dlp_make_the_densities_of_its_medians():
    medians = torch.tensor([0.4, 0.1, 0.2, 0.9])
    sizes = [10_000] * 4
    importance = 1 - medians / medians.sum()
    expected = _densities(importance, sizes, 0.4, spread=0.15)
    torch.testing.assert_close(
        _densities(-medians, sizes, 0.4, spread=0.15), expected, atol=2e-4, rtol=0
    )


def test_unequal_items_count_by_their_size():
    sizes = [1000, 50_000, 20_000, 4000]
    found = _densities(SCORES, sizes, 0.5)
    assert float(found.max() - found.min()) == pytest.approx(0.16, abs=2e-3)
    kept = float((found * torch.tensor(sizes)).sum()) / sum(sizes)
    assert 0.499 < kept <= 0.5


def test_what_a_full_item_cannot_take_goes_to_the_others():
    found = _densities(SCORES, [10_000] * 4, 0.95, spread=0.15)
    assert found.max() == 1
    assert 0.9495 < float(found.mean()) <= 0.95


@pytest.mark.parametrize(
    ("scores", "options"), [(SCORES, {"spread": 0.0}), (torch.full((4,), 0.3), {})]
)
def test_without_a_spread_it_is_uniform(scores, options):
    costs = _costs(*[600] * 4)
    found = stretch(scores, costs, budget=1001, **options)
    assert torch.equal(found, uniform(costs, budget=1001))


def test_refuses_a_spread_that_is_none():
    with pytest.raises(UserError, match="spread -1"):
        stretch(SCORES, _costs(5, 5, 5, 5), budget=10, spread=-1.0)


def test_nothing_to_allocate_costs_nothing():
    assert stretch(torch.zeros(0), [], budget=0).tolist() == []


@pytest.mark.parametrize("measure", ["owl", "dlp"])
def test_layers_of_a_block_share_one_density(llama, text, measure):
    """The norms that the scores need come from calibration, the spread from the options."""
    plan = lw.plan(
        llama,
        density=0.5,
        allocate="stretch",
        measure=measure,
        options={"allocate/stretch": {"spread": 0.1}},
        pruner="wanda",
        calibration=str(text),
        samples=2,
        length=16,
        cache=False,
    )
    layers = lw.open(llama).structure.layers
    blocks = {layer.block: [] for layer in layers.values()}
    for name, layer in layers.items():
        blocks[layer.block].append(plan.layers[name])
    means = []
    for plans in blocks.values():
        assert len({one.score for one in plans}) == 1
        densities = [one.density for one in plans]
        # Counts are whole: several levels keep as many weights of a layer of 512.
        assert max(densities) - min(densities) < 1 / 256
        means.append(sum(densities) / len(densities))
    assert max(means) - min(means) == pytest.approx(0.2, abs=4e-3)


def test_options_that_there_are_not_are_refused(llama):
    wish = {"density": 0.5, "allocate": "stretch", "measure": "zd"}
    with pytest.raises(UserError, match="no option"):
        lw.plan(llama, options={"allocate/stretch": {"width": 0.1}}, **wish)
