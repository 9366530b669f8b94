import math
import os
from pathlib import Path

import pytest
import torch
from trained import ASSETS

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.measure._spectrum import eigenvalues, fitted
from layerwise.measure.alpha import alpha


def drawn(count, exponent):
    """Exact quantiles of a density that falls as x^-exponent from 1 on."""
    below = (torch.arange(count).double() + 0.5) / count
    return (1 - below) ** (-1 / (exponent - 1))


def by_definition(weight, low=-math.inf, high=math.inf):
    """alpha and D, start by start and eigenvalue by eigenvalue."""
    values = sorted(float(s) ** 2 for s in torch.linalg.svdvals(weight.double()))
    values = [value for value in values if value > 1e-10 * values[-1]]
    best = (math.inf, math.nan)
    for i in range(len(values) - 1):
        if low <= values[i] <= high:
            tail, n = values[i:], len(values) - i
            found = 1 + n / sum(math.log(x / values[i]) for x in tail)
            expected = [1 - (x / values[i]) ** (1 - found) for x in tail]
            distance = max(abs(e - j / n) for j, e in enumerate(expected))
            best = min(best, (distance, found))
    return best[1]


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (50, 50), (200, 160)])
def test_is_the_exponent_of_the_tail_nearest_to_its_law(shape):
    weight = torch.randn(*shape) * torch.rand(shape[1])
    assert -alpha(weight) == pytest.approx(by_definition(weight), rel=1e-6)


def test_starts_at_the_median_or_near_the_most_frequent_eigenvalue():
    weight = torch.randn(64, 150)
    values = eigenvalues(weight)
    around = (float(values[31:33].mean()), float(values[32:34].mean()))
    assert -alpha(weight, start="mid") == pytest.approx(by_definition(weight, *around))
    counts, edges = torch.histogram(values.log10(), 100)
    mode = 10 ** float(edges[counts.argmax()])
    bounds = (0.95 * mode, 1.5 * mode)
    assert -alpha(weight, start="peak") == pytest.approx(by_definition(weight, *bounds))


@pytest.mark.parametrize("exponent", [2.0, 3.0, 4.0])
def test_finds_the_exponent_that_eigenvalues_were_drawn_from(exponent):
    tail = fitted(drawn(3000, exponent), "ks")
    assert tail is not None
    assert tail.alpha == pytest.approx(exponent, abs=0.15)
    assert tail.distance < 0.01


@pytest.mark.parametrize("start", ["ks", "mid", "peak"])
def test_only_singular_values_count_and_not_their_scale(start):
    weight = torch.randn(60, 100).double()
    turn = torch.linalg.qr(torch.randn(100, 100).double()).Q
    expected = alpha(weight, start=start)
    for other in (weight.T, 1e-6 * weight, 1e6 * weight, weight @ turn):
        assert alpha(other, start=start) == pytest.approx(expected, rel=1e-5)


def test_the_positions_of_a_kernel_are_pooled():
    weight = torch.randn(24, 16, 3, 3)
    pooled = torch.cat([eigenvalues(weight[:, :, y, x]) for y in range(3) for x in range(3)])
    tail = fitted(pooled.sort().values, "mid")
    assert tail is not None
    assert alpha(weight.flatten(1), start="mid", positions=9) == pytest.approx(-tail.alpha)
    with pytest.raises(UserError, match="kernels of 9"):
        alpha(torch.randn(4, 10), positions=9)


@pytest.mark.parametrize("start", ["ks", "mid", "peak"])
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(30, 40),
        torch.ones(30, 40),
        torch.eye(50),
        torch.linalg.qr(torch.randn(50, 50)).Q,
        torch.randn(1, 40),
        torch.randn(40, 1),
        torch.randn(9, 40),
    ],
)
def test_a_layer_without_a_tail_has_the_steepest(weight, start):
    assert alpha(weight, start=start) == -100


@pytest.mark.trained
def test_what_was_trained_has_a_heavier_tail_than_noise():
    """Two blocks of a model of the assets, and their own weights in another order."""
    if ASSETS not in os.environ:
        pytest.skip(f"{ASSETS} is not set")
    opened = lw.open(Path(os.environ[ASSETS]) / "models/reference-6m")
    found = list(opened.structure.layers.values())
    noise = torch.Generator().manual_seed(0)
    layers = [one.read(opened.source).float() for one in found[:14]]
    orders = [torch.randperm(weight.numel(), generator=noise) for weight in layers]
    pairs = list(zip(layers, orders, strict=True))
    trained = [alpha(weight, start="mid") for weight in layers]
    chance = [alpha(w.flatten()[order].view_as(w), start="mid") for w, order in pairs]
    assert sum(trained) / len(trained) > sum(chance) / len(chance) + 0.3
