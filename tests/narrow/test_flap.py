"""FLAP's scores and bias against their definition, and what the bias is worth."""

import pytest
import torch

from layerwise.core.errors import UserError
from layerwise.narrow.flap import flap
from layerwise.narrow.magnitude import magnitude
from layerwise.narrow.wanda import wanda


def layer(width: int = 64, tokens: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer, and inputs whose means and spreads differ from channel to channel."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(32, width, generator=draw)
    spread = (0.8 * torch.randn(width, generator=draw)).exp()
    mean = (0.8 * torch.randn(width, generator=draw)).exp() * torch.randn(width, generator=draw)
    return weight, mean + spread * torch.randn(tokens, width, generator=draw)


def run(weight, inputs, **options):
    mean, variance = inputs.mean(dim=0), inputs.var(dim=0, correction=0)
    return flap(weight, mean, variance, **options)


def test_scores_are_those_of_the_definition():
    weight, inputs = layer(12)
    cut = run(weight, inputs, density=0.5, units=4)
    scores = torch.zeros(12)
    for j in range(12):
        middle = sum(float(x) for x in inputs[:, j]) / len(inputs)
        fluctuation = sum((float(x) - middle) ** 2 for x in inputs[:, j]) / len(inputs)
        scores[j] = fluctuation * sum(float(w) ** 2 for w in weight[:, j])
    standard = (scores - scores.mean()) / scores.std(correction=0)
    wanted = torch.tensor([float(standard[3 * u : 3 * u + 3].mean()) for u in range(4)])
    assert torch.allclose(cut.scores, wanted, atol=1e-4)
    assert cut.kept.tolist() == [bool(s >= wanted.sort().values[2]) for s in wanted]
    gone = [j for j in range(12) if not cut.kept[j // 3]]
    bias = sum(weight[:, j] * inputs[:, j].mean() for j in gone)
    assert torch.allclose(cut.bias, bias, atol=1e-4)


def test_one_layer_loses_less_than_by_norms_and_less_with_its_bias():
    weight, inputs = layer(256)
    answer = inputs @ weight.T
    ours = run(weight, inputs, density=0.5, units=256)
    theirs = wanda(weight, inputs.square().mean(dim=0).sqrt(), density=0.5, units=256)
    mean = inputs.mean(dim=0)

    def error(kept: torch.Tensor, bias: torch.Tensor | float) -> float:
        made = (inputs * kept) @ weight.T + bias
        return float((made - answer).square().sum() / answer.square().sum())

    lost = error(ours.kept, ours.bias)
    assert error(ours.kept, 0.0) > 0.05  # what the bias gives back is worth something
    assert lost <= 0.5 * error(theirs.kept, 0.0)
    assert lost <= 0.8 * error(theirs.kept, weight @ (mean * ~theirs.kept))
    assert lost <= 0.5 * error(ours.kept, 0.0)


def test_constant_channels_go_first_and_nothing_is_lost_with_them():
    weight, inputs = layer()
    inputs[:, [3, 17, 40]] = torch.tensor([2.0, -7.0, 1e4])
    cut = run(weight, inputs, density=61 / 64, units=64)
    assert (~cut.kept).nonzero().flatten().tolist() == [3, 17, 40]
    before = inputs.double() @ weight.double().T
    after = (inputs * cut.kept).double() @ weight.double().T + cut.bias
    assert (after - before).abs().max() <= 1e-6 * before.abs().max()


def test_a_layer_without_fluctuation_has_no_scores():
    weight, inputs = layer()
    cut = run(weight, torch.ones_like(inputs), density=0.5, units=64)
    assert not cut.scores.any()
    assert cut.kept[:32].all()


def test_one_unit_stays_whatever_is_asked():
    weight, inputs = layer()
    cut = run(weight, inputs, density=0.001, units=8)
    assert int(cut.kept.sum()) == 1
    assert "one stays" in cut.notes[0]


def test_statistics_must_be_finite():
    weight, inputs = layer()
    inputs[0, 0] = float("inf")
    with pytest.raises(UserError, match="NaN or infinity"):
        run(weight, inputs, density=0.5, units=64)


def test_baselines_score_what_they_say():
    weight, inputs = layer(12)
    norm = inputs.square().mean(dim=0).sqrt()
    sums = torch.tensor([sum(abs(float(w)) for w in weight[:, j]) for j in range(12)]) * norm
    wanted = (sums / sums.mean()).reshape(4, 3).mean(dim=1)
    assert torch.allclose(wanda(weight, norm, density=0.5, units=4).scores, wanted, atol=1e-5)
    energy = torch.tensor([sum(float(w) ** 2 for w in weight[:, j]) for j in range(12)])
    wanted = (energy / energy.mean()).reshape(4, 3).mean(dim=1)
    assert torch.allclose(magnitude(weight, density=0.5, units=4).scores, wanted, atol=1e-5)


def test_an_input_that_no_token_reached_is_scored_by_magnitude():
    weight, _ = layer(12)
    cut = wanda(weight, torch.zeros(12), density=0.5, units=12)
    sums = weight.abs().sum(dim=0)
    assert torch.allclose(cut.scores, sums / sums.mean())
    assert cut.notes
