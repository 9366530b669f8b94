"""Curves of low loss between networks, against bends written out and networks of known ways."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import layerwise as lw
from layerwise.core import catalogue
from layerwise.core.errors import UserError
from layerwise.core.running.curve import POINTS, along, bent, on_curve
from layerwise.measure.mode_connectivity import mode_connectivity

TEXT = torch.arange(8 * 32).remainder(251).reshape(8, 32)


def test_is_what_the_definition_says():
    first, last, middle = (torch.randn(4, 3) for _ in range(3))
    curve = torch.tensor([1.0, 1.2, 2.0, 0.9, 1.4])
    found = mode_connectivity(first, last, middle, curve)
    expected = float((middle - (first + last) / 2).norm() / (first - last).norm())
    assert found["bent"] == pytest.approx(expected, rel=1e-6)
    assert found["connectivity"] == pytest.approx(1.2 - 2.0)
    low = torch.tensor([1.0, 0.5, 0.9, 1.0, 1.0])
    assert mode_connectivity(first, last, middle, low)["connectivity"] == pytest.approx(0.5)
    across = catalogue.get("measure/mode_connectivity").across
    assert across([found, found]) == {"connectivity": found["connectivity"]}
    with pytest.raises(UserError, match="2 points"):
        mode_connectivity(first, last, middle, curve[:2])


def test_a_curve_ends_where_it_should():
    parts = [{"a": torch.randn(3)} for _ in range(3)]
    assert torch.equal(on_curve(*parts, 0.0)["a"], parts[0]["a"])
    assert torch.equal(on_curve(*parts, 1.0)["a"], parts[2]["a"])
    halfway = sum(share * part["a"] for share, part in zip((0.25, 0.5, 0.25), parts, strict=True))
    assert torch.allclose(on_curve(*parts, 0.5)["a"], halfway)


def test_goes_round_a_hill():
    """The loss is low on a circle: the straight way between opposite points leads over a hill."""

    def loss(network, part):
        return (network["w"].norm() - 1).square().clamp(max=1) + 0 * part.sum()

    ends = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([-0.999, 0.04])}
    middle = bent(loss, *ends, 24, batch=1)
    straight = {"w": (ends[0]["w"] + ends[1]["w"]) / 2}
    hill = along(loss, (ends[0], straight, ends[1]), 4, batch=4)
    round_about = along(loss, (ends[0], middle, ends[1]), 4, batch=4)
    assert len(hill) == len(POINTS)
    assert hill[2] > 0.9
    assert max(round_about) < 0.25 * hill[2]


def test_the_loss_on_the_curve_is_that_of_the_model_there(llama):
    other = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    ours = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    shown = {"calibration": TEXT, "samples": 2, "length": 32, "cache": False}
    found = lw.inspect(ours, "mode_connectivity", against=other, **shown)
    told = found.about["mode_connectivity"]["connectivity"]
    assert set(found.details["mode_connectivity.connectivity"].values()) == {told}
    assert all(value > 0 for value in found.scores["mode_connectivity"].values())


def test_a_model_and_itself_are_connected():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    pictures = torch.randn(40, 5)
    found = lw.inspect(model, "mode_connectivity", against=model, calibration=pictures, cache=False)
    answers = model(pictures).detach()
    loss = float(functional.cross_entropy(answers, answers.argmax(1)))
    assert 0 <= found.about["mode_connectivity"]["connectivity"] < loss


def test_batch_norms_are_refused():
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    with pytest.raises(UserError, match="batch norms"):
        lw.inspect(
            model, "mode_connectivity", against=model, calibration=torch.randn(8, 5), cache=False
        )
