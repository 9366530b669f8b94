import functools
import math
import os
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from torch.nn import functional

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.running.runner import Runner
from layerwise.core.running.slopes import WeightSlopes
from layerwise.measure.ecoflap_draws import ecoflap_draws

ASSETS = "LAYERWISE_ASSETS"


def test_is_the_mean_size():
    assert ecoflap_draws(torch.tensor([0.5, -1.5, 1.0])) == pytest.approx(1.0)
    assert ecoflap_draws(torch.zeros(4)) == 0


def test_refuses_a_slope_that_is_no_number():
    with pytest.raises(UserError):
        ecoflap_draws(torch.tensor([1.0, float("nan")]))


def test_slopes_are_those_of_the_loss(llama):
    """Along each window's noise, as derivatives have it, of a layer in each block."""
    opened = lw.open(llama)
    ids = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(1))
    runner = Runner(opened.source, opened.structure)
    slopes = WeightSlopes(runner, ids)
    model = lw.load(llama)
    hidden = runner.start(ids)
    for block in runner.blocks:
        layers = [one for one in opened.structure.layers.values() if one.block == block]
        found = slopes.of(block, layers, hidden)
        assert found.keys() == {one.name for one in layers}
        layer = layers[2]
        weight = model.get_submodule(layer.name).weight.requires_grad_()
        generator = torch.Generator().manual_seed(0)
        for window, slope in zip(ids, found[layer.name], strict=True):
            noise = torch.randn(weight.shape, generator=generator)
            logits = model(window[None]).logits[0]
            loss = functional.cross_entropy(logits[:-1], window[1:])
            (gradient,) = torch.autograd.grad(loss, weight)
            wanted = float((gradient * noise).sum())
            assert float(slope) == pytest.approx(wanted, rel=0.02, abs=2e-3)
        hidden = runner.forward(block, hidden, {})


def test_the_weights_are_as_they_were(llama, text):
    """What is scored by draws answers the same afterwards, and twice the same."""
    told = {"calibration": text, "samples": 2, "length": 32}
    first = lw.measure(llama, ["ecoflap_draws"], **told).scores["ecoflap_draws"]
    assert lw.measure(llama, ["ecoflap_draws"], **told).scores["ecoflap_draws"] == first
    assert all(score > 0 for score in first.values())


def test_draws_estimate_the_norm_of_the_gradient():
    """The card's claim: 200 draws are within 15% for every layer of a classifier of digits."""
    from layerwise.testing.digits import _trained

    model, images, labels = _trained(0)
    weights = [part.weight.double() for part in model if isinstance(part, torch.nn.Linear)]
    biases = [part.bias.double() for part in model if isinstance(part, torch.nn.Linear)]

    def loss(number, weight):
        hidden = images[:60].double()
        for place, bias in enumerate(biases):
            hidden = hidden if place == 0 else hidden.relu()
            used = weight if place == number else weights[place]
            hidden = functional.linear(hidden, used, bias)
        return functional.cross_entropy(hidden, labels[:60])

    for number, weight in enumerate(weights):
        leaf = weight.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(number, leaf), leaf)
        draws = torch.zeros(200)
        for place in range(200):
            noise = torch.randn_like(weight)
            up, down = (float(loss(number, weight + sign * 1e-3 * noise)) for sign in (1, -1))
            draws[place] = (up - down) / 2e-3
        estimate = ecoflap_draws(draws) / (math.sqrt(2 / math.pi) * float(gradient.norm()))
        assert estimate == pytest.approx(1, abs=0.15)


@functools.cache
def scores(model):
    if not os.environ.get(ASSETS):
        pytest.skip(f"{ASSETS} is not set")
    assets = Path(os.environ[ASSETS])
    text = assets / "text/tinystories/train_stories.json"
    found = lw.measure(
        str(assets / "models" / model),
        ["ecoflap", "ecoflap_draws"],
        calibration=str(text),
        samples=8,
        length=128,
    )
    return found.scores["ecoflap"], found.scores["ecoflap_draws"]


@pytest.mark.trained
def test_draws_rank_layers_as_gradients_do():
    """The card's claim: a rank correlation of 0.8 at least, over blocks; over layers besides."""
    whole, drawn = scores("stories-char-940k")
    assert spearmanr(list(whole.values()), [drawn[name] for name in whole]).statistic >= 0.8
    blocks = sorted({name.split(".")[2] for name in whole})
    sums = [
        [sum(v for name, v in one.items() if name.split(".")[2] == block) for block in blocks]
        for one in (whole, drawn)
    ]
    assert spearmanr(*sums).statistic >= 0.8
