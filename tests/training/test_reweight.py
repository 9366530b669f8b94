"""A fixed head, and what the paper claims of deep features, on digits."""

import functools
import itertools

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from layerwise.core.errors import UserError
from layerwise.training.reweight import Reweight


def test_is_the_definition():
    head = Reweight(4, kappa=2.0)
    assert torch.equal(head(torch.ones(3, 4)), torch.tensor([1, 0.5, 0.25, 0.125]).expand(3, 4))
    assert not list(head.parameters())
    assert not head.state_dict()
    assert float(Reweight(512, kappa=1.1).weights.min()) == pytest.approx(1e-6)
    with pytest.raises(UserError, match=r"kappa 0\.9"):
        Reweight(4, kappa=0.9)


def test_a_kappa_of_1_changes_no_bit_of_training():
    nets = []
    for middle in ([Reweight(8, kappa=1.0)], []):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), *middle, nn.Linear(8, 3))
        inputs, labels = torch.randn(20, 5), torch.randint(3, (20,))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            functional.cross_entropy(net(inputs), labels).backward()
            optimizer.step()
        nets.append(net)
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other)


def _with(spurious, pixels):
    return torch.cat([pixels, 2 * functional.one_hot(spurious, 10)], dim=1)


@functools.cache
def _probed(seed):
    """How well ridge probes read digits off each hidden layer of a net that had a shortcut.

    The card's setting: ten more inputs tell the digit 95% of the time in training, and nothing
    where probes are fitted and judged.
    """
    pixels, classes = load_digits(return_X_y=True)
    pictures, labels = torch.tensor(pixels / 16).float(), torch.tensor(classes)
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    sides = (74, 128, 64, 64)
    parts = [p for a, b in itertools.pairwise(sides) for p in (nn.Linear(a, b), nn.ReLU())]
    net = nn.Sequential(*parts, nn.Linear(64, 10))
    told = torch.where(
        torch.rand(1200, generator=draw) < 0.95,
        labels[:1200],
        torch.randint(10, (1200,), generator=draw),
    )
    shown = _with(told, pictures[:1200])
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(40):
        for part in torch.randperm(1200, generator=draw).split(64):
            loss = functional.cross_entropy(net(shown[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    features = _with(torch.randint(10, (len(labels),), generator=draw), pictures)
    found = []
    with torch.no_grad():
        for place in range(0, 6, 2):
            features = net[place + 1](net[place](features))
            centred = (features - features[:1200].mean(dim=0)).double()
            known, truth = centred[:1200], functional.one_hot(labels[:1200], 10).double()
            gram = known.T @ known + torch.eye(known.shape[1]).double()
            fitted = torch.linalg.solve(gram, known.T @ (truth - truth.mean(dim=0)))
            guess = (centred[1200:] @ fitted + truth.mean(dim=0)).argmax(dim=1)
            found.append(float((guess == labels[1200:]).double().mean()))
    return found


@pytest.mark.trained
def test_deep_layers_lose_what_the_shortcut_made_needless():
    """Hidden 1 at least five points above the last hidden layer, mean of three seeds."""
    found = torch.tensor([_probed(seed) for seed in range(3)]).mean(dim=0)
    assert found[0] >= found[2] + 0.05
