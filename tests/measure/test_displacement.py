import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from layerwise.measure.alignment import alignment
from layerwise.measure.displacement import displacement


def test_is_the_relative_distance():
    weight, base = torch.randn(4, 6), torch.randn(4, 6)
    moved = sum((x - y) ** 2 for x, y in zip(weight.flatten(), base.flatten(), strict=True))
    size = sum(x**2 for x in base.flatten())
    assert displacement(weight, base) == pytest.approx(math.sqrt(moved / size), rel=1e-6)
    assert displacement(base, base) == 0
    assert displacement(3 * base, base) == pytest.approx(2)


def test_what_starts_at_zero_counts_as_moved_once_it_moved():
    assert displacement(torch.randn(3, 3), torch.zeros(3, 3)) == 1
    assert displacement(torch.zeros(3, 3), torch.zeros(3, 3)) == 0


def test_large_initial_weights_learn_lazily():
    """The paper's scale control: three times as large, weights move less and change less."""
    (rich_way, rich), (lazy_way, lazy) = (_trained(factor) for factor in (1, 3))
    assert lazy_way < rich_way / 2
    assert lazy < rich  # alignment, negated


def _trained(factor):
    """How far the hidden layer moved by a loss of 0.05, and how little its geometry stayed."""
    pixels, classes = load_digits(return_X_y=True)
    pictures, labels = torch.tensor(pixels / 16).float(), torch.tensor(classes)
    torch.manual_seed(0)
    first, last = nn.Linear(64, 100), nn.Linear(100, 10)
    net = nn.Sequential(first, nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), last)
    for parameter in net.parameters():
        parameter.data *= factor
    start, before = net[2].weight.detach().clone(), _hidden(net, pictures[:200])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05 / factor**2, momentum=0.9)
    running, steps = 2.3, 0
    while running > 0.05 and steps < 6000:
        for part in torch.randperm(len(pictures)).split(64):
            loss = functional.cross_entropy(net(pictures[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            running, steps = 0.95 * running + 0.05 * float(loss.detach()), steps + 1
    assert running <= 0.05
    after = _hidden(net, pictures[:200])
    return displacement(net[2].weight.detach(), start), alignment(after, before)


def _hidden(net, pictures):
    with torch.no_grad():
        return net[:4](pictures)
