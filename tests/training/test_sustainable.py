"""Adversarial training with layers held still: against its definition, and on digits."""

import copy
import functools

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from layerwise.core.errors import UserError
from layerwise.training.sustainable import attack, changes, most_vulnerable, objective

LAYERS = ("1", "3")


def net(seed=0, sides=(6, 8, 7, 3)):
    torch.manual_seed(seed)
    one, two, three, four = sides
    return nn.Sequential(
        nn.Linear(one, two), nn.ReLU(), nn.Linear(two, three), nn.ReLU(), nn.Linear(three, four)
    )


def test_is_what_the_definition_says():
    model = net()
    inputs, labels = torch.rand(5, 6), torch.randint(3, (5,))
    moved = inputs + 0.1 * torch.randn(5, 6)
    expected = functional.cross_entropy(model(moved), labels)
    for depth in (2, 4):
        clean, after = model[:depth](inputs), model[:depth](moved)
        parts = [
            (clean[n] - after[n]).square().sum().sqrt() / clean[n].square().sum().sqrt()
            for n in range(5)
        ]
        expected = expected + 0.3 * sum(parts) / 5
    found = objective(model, inputs, labels, moved, LAYERS, gamma=0.3)
    assert torch.allclose(found, expected)
    slopes = [torch.autograd.grad(one, list(model.parameters())) for one in (found, expected)]
    for ours, theirs in zip(*slopes, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_what_does_not_move_costs_nothing_and_has_a_slope():
    model, inputs = net(), torch.rand(4, 6)
    _, found = changes(model, inputs, inputs.clone(), LAYERS)
    assert [float(one.detach()) for one in found.values()] == [0.0, 0.0]
    slopes = torch.autograd.grad(sum(found.values()), list(model.parameters()), allow_unused=True)
    assert all(one is None or bool(one.isfinite().all()) for one in slopes)
    scaled = copy.deepcopy(model)
    scaled[0].weight.data *= 4
    scaled[0].bias.data *= 4
    moved = inputs + 0.1
    pairs = [changes(one, inputs, moved, ("1",))[1]["1"].detach() for one in (model, scaled)]
    assert torch.allclose(pairs[0], pairs[1])


def test_without_gamma_it_is_plain_adversarial_training():
    model = net()
    inputs, labels = torch.rand(5, 6), torch.randint(3, (5,))
    moved = inputs + 0.1
    plain = functional.cross_entropy(model(moved), labels)
    assert torch.equal(objective(model, inputs, labels, moved, LAYERS, gamma=0.0), plain)
    assert not any(part._forward_hooks for part in model.modules())


def test_an_attack_stays_near_and_raises_the_loss():
    model = net().train()
    inputs, labels = torch.rand(40, 6), torch.randint(3, (40,))
    moved = attack(model, inputs, labels, radius=0.1, step=0.03, steps=10)
    assert float((moved - inputs).abs().max()) <= 0.1 + 1e-6
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1
    with torch.no_grad():
        losses = [functional.cross_entropy(model(x), labels) for x in (inputs, moved)]
    assert losses[1] > losses[0]
    assert model.training
    assert all(one.requires_grad and one.grad is None for one in model.parameters())


def test_the_most_vulnerable_are_above_the_mean():
    moved = {"a": 0.1, "b": 0.5, "c": 0.3}
    assert most_vulnerable(moved) == ["b"]
    assert most_vulnerable(moved, above=-1.0) == ["b", "c"]
    assert most_vulnerable({}) == []
    with pytest.raises(UserError, match="no module 9"):
        changes(net(), torch.rand(2, 6), torch.rand(2, 6), ("9",))


@functools.cache
def _trained(gamma):
    """Accuracy on clean pictures, within the radius of the training, and at twice that."""
    pixels, classes = load_digits(return_X_y=True)
    pictures, labels = torch.tensor(pixels / 16).float(), torch.tensor(classes)
    model = net(0, (64, 128, 128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        for part in torch.randperm(1200, generator=draw).split(64):
            given = pictures[part], labels[part]
            moved = attack(model, *given, radius=0.1, step=0.03, steps=5)
            optimizer.zero_grad()
            objective(model, *given, moved, LAYERS, gamma=gamma).backward()
            optimizer.step()
    test = pictures[1200:], labels[1200:]
    found = []
    for radius in (0.0, 0.1, 0.2):
        moved = attack(model, *test, radius=radius, step=radius / 4 + 1e-9, steps=20)
        with torch.no_grad():
            found.append(float((model(moved).argmax(1) == test[1]).double().mean()))
    return found


@pytest.mark.trained
def test_held_layers_stand_what_they_were_not_trained_for():
    """The card's claim, at gamma 0.5: a point more at twice the radius of the training."""
    assert _trained(0.5)[2] >= _trained(0.0)[2] + 0.01
