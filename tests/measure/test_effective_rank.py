import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from layerwise.core.errors import UserError
from layerwise.measure.effective_rank import effective_rank


def by_definition(weight, order, power):
    values = [float(s) ** power for s in torch.linalg.svdvals(weight.double())]
    parts = [value / sum(values) for value in values]
    if order == 1:
        return math.exp(-sum(p * math.log(p) for p in parts))
    if order == math.inf:
        return 1 / max(parts)
    return sum(p**order for p in parts) ** (1 / (1 - order))


@pytest.mark.parametrize("order", [0, 0.5, 1, 2, 3, math.inf])
@pytest.mark.parametrize("power", [1, 2])
def test_is_the_exponential_of_an_entropy(order, power):
    for shape in ((20, 50), (50, 20), (7, 7)):
        weight = torch.randn(*shape) * torch.rand(shape[1])
        found = effective_rank(weight, order=float(order), power=power)
        assert found == pytest.approx(by_definition(weight, order, power), rel=1e-5)
        share = effective_rank(weight, order=float(order), power=power, share=True)
        assert share == pytest.approx(found / min(shape))


def test_is_the_stable_rank_and_the_participation_ratio():
    weight = torch.randn(30, 40)
    values = torch.linalg.svdvals(weight.double())
    stable = float(values.square().sum() / values[0] ** 2)
    assert effective_rank(weight, order=math.inf, power=2) == pytest.approx(stable, rel=1e-5)
    spread = float(values.sum() ** 2 / values.square().sum())
    assert effective_rank(weight, order=2.0) == pytest.approx(spread, rel=1e-5)


@pytest.mark.parametrize("order", [0.0, 1.0, 2.0, math.inf])
def test_equal_singular_values_all_count_and_no_others(order):
    turned = torch.linalg.qr(torch.randn(30, 12).double()).Q
    assert effective_rank(turned, order=order) == pytest.approx(12)
    assert effective_rank(turned @ torch.randn(12, 9).double(), order=0.0) == pytest.approx(9)
    assert effective_rank(torch.ones(5, 8), order=order) == pytest.approx(1)
    assert effective_rank(torch.zeros(5, 8), order=order) == 0


def test_falls_with_the_order():
    weight = torch.randn(20, 30)
    ranks = [effective_rank(weight, order=order) for order in (0.0, 0.5, 1.0, 2.0, math.inf)]
    assert ranks == sorted(ranks, reverse=True)


@pytest.mark.parametrize("given", [{"order": -1.0}, {"order": math.nan}, {"power": 3}])
def test_what_is_no_rank_is_refused(given):
    with pytest.raises(UserError, match="asked for"):
        effective_rank(torch.randn(4, 4), **given)


def test_weights_of_a_low_rank_learn_richly():
    """The paper's own claim: from initial weights of one norm, those of higher rank change less."""
    assert _aligned(100) - _aligned(2) >= 0.1


def _aligned(rank):
    """How alike the hidden layer's kernel is before and after training, from 0 to 1."""
    pixels, classes = load_digits(return_X_y=True)
    pictures, labels = torch.tensor(pixels / 16).float(), torch.tensor(classes)
    torch.manual_seed(0)
    first, last = nn.Linear(64, 100), nn.Linear(100, 10)
    net = nn.Sequential(first, nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), last)
    u, s, v = torch.linalg.svd(torch.randn(100, 100) / 10)
    kept = u[:, :rank] @ s[:rank].diag() @ v[:rank]
    net[2].weight.data = kept * s.norm() / kept.norm()
    assert effective_rank(net[2].weight.data, order=0.0) == pytest.approx(rank, rel=0.02)
    before = _kernel(net, pictures[:200])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    running = 2.3
    while running > 0.05:
        for part in torch.randperm(len(pictures)).split(64):
            loss = functional.cross_entropy(net(pictures[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            running = 0.95 * running + 0.05 * float(loss.detach())
    after = _kernel(net, pictures[:200])
    return float((before * after).sum() / (before.norm() * after.norm()))


def _kernel(net, pictures):
    with torch.no_grad():
        hidden = net[:4](pictures)
        return hidden @ hidden.T
