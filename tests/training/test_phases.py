"""Landscapes of losses, against Hessians written out, and the phases that they tell."""

import dataclasses
import functools
import itertools
import math

import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from layerwise.core.errors import UserError
from layerwise.training.phases import Landscape, landscape, phases


def net(seed, width=6, sides=(5, 3)):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(sides[0], width), nn.Tanh(), nn.Linear(width, sides[1]))


def test_is_what_the_definitions_say():
    inputs, labels = torch.randn(60, 5), torch.randint(3, (60,))
    models = [net(seed) for seed in range(3)]
    found = landscape(models, inputs, labels, epochs=1)
    answers = [model(inputs).detach() for model in models]
    losses = [float(functional.cross_entropy(one, labels)) for one in answers]
    assert found.loss == pytest.approx(sum(losses) / 3, rel=1e-6)
    tops, traces, spreads = [], [], []
    for model in models:
        shapes = {name: one.shape for name, one in model.named_parameters()}
        flat = torch.cat([one.detach().flatten() for one in model.parameters()])

        def of(point, model=model, shapes=shapes):
            parts = point.split([shape.numel() for shape in shapes.values()])
            given = {
                name: part.reshape(shape)
                for (name, shape), part in zip(shapes.items(), parts, strict=True)
            }
            return functional.cross_entropy(functional_call(model, given, (inputs,)), labels)

        hessian = torch.autograd.functional.hessian(of, flat)
        tops.append(float(torch.linalg.eigvalsh(hessian)[-1]))
        traces.append(float(hessian.trace()))
        apart = hessian - hessian.diag().diag()
        spreads.append(2 * float(apart.square().sum()) / 100)
    assert found.sharpness == pytest.approx(sum(tops) / 3, rel=1e-2)
    assert abs(found.trace - sum(traces) / 3) < 3 * math.sqrt(sum(spreads)) / 3
    logits = [one.double() - one.double().mean(dim=0) for one in answers]
    alike = [
        (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
        for x, y in itertools.combinations(logits, 2)
    ]
    assert found.similarity == pytest.approx(float(sum(alike)) / 3, rel=1e-5)
    flat = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models]
    far = [float((x - y).norm()) for x, y in itertools.combinations(flat, 2)]
    assert found.distance == pytest.approx(sum(far) / 3, rel=1e-5)
    assert found.guess == pytest.approx(math.log(3))


CELL = Landscape(0.01, 1.0, 1.0, 0.0, 0.9, 1.0, 2.0)


def test_phases_are_those_of_the_table():
    cells = {
        "small": dataclasses.replace(CELL, loss=1.0, connectivity=-0.5),
        "hot": dataclasses.replace(CELL, loss=1.0, connectivity=0.5),
        "narrow": dataclasses.replace(CELL, connectivity=-0.5),
        "over": dataclasses.replace(CELL, similarity=0.3, connectivity=-0.09),
        "good": CELL,
    }
    expected = {"small": "I", "hot": "II", "narrow": "III", "over": "IV-A", "good": "IV-B"}
    assert phases(cells) == expected
    assert phases(cells, alike=0.2)["over"] == "IV-B"
    assert phases(cells, small=2.0)["small"] == "III"
    assert phases({"one": CELL}) == {"one": "IV-B"}
    with pytest.raises(UserError, match="no networks"):
        phases({})


def test_what_has_no_landscape_is_refused():
    inputs, labels = torch.randn(6, 5), torch.randint(3, (6,))
    with pytest.raises(UserError, match="1 networks"):
        landscape([net(0)], inputs, labels)
    with pytest.raises(UserError, match="2 architectures"):
        landscape([net(0), net(1, width=7)], inputs, labels)
    normed = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    with pytest.raises(UserError, match="batch norms"):
        landscape([normed, normed], inputs, labels)


@functools.cache
def _cells():
    """Nets for digits, three seeds of each width, 30 epochs: what their test pictures show."""
    pixels, classes = load_digits(return_X_y=True)
    pictures, labels = torch.tensor(pixels / 16).float(), torch.tensor(classes)
    cells = {}
    for width in (2, 4, 32, 128):
        models = []
        for seed in range(3):
            model = net(seed, width, (64, 10))
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            draw = torch.Generator().manual_seed(seed)
            for _ in range(30):
                for part in torch.randperm(1200, generator=draw).split(64):
                    loss = functional.cross_entropy(model(pictures[part]), labels[part])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            models.append(model)
        cells[width] = landscape(models, pictures[:1200], labels[:1200])
    return cells


@pytest.mark.trained
def test_narrow_networks_have_barriers_that_wide_ones_have_not():
    cells = _cells()
    ways = {width: cell.connectivity for width, cell in cells.items()}
    assert (ways[2] + ways[4]) / 2 < (ways[32] + ways[128]) / 2


@pytest.mark.trained
def test_wide_networks_answer_alike():
    cells = _cells()
    alike = [cell.similarity for cell in cells.values()]
    assert stats.spearmanr(list(cells), alike).statistic >= 0.6


@pytest.mark.trained
def test_the_curvature_grows_with_the_loss():
    cells = _cells().values()
    ranks = stats.spearmanr([one.loss for one in cells], [one.trace for one in cells])
    assert ranks.statistic >= 0.5
