import pytest
import torch
from trained import layers

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.quantize.adadim import Grouped, adadim
from layerwise.quantize.gptq import gptq
from layerwise.quantize.rtn import rtn

QUICK = {"text": "builtin", "text_samples": 2, "length": 32, "samples": 4, "noise_floor": False}


def problem(rows=48, width=96, loud=1.0):
    noise = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, width, generator=noise)
    inputs += inputs[:, :1] / 2
    weight = torch.randn(rows, width, generator=noise)
    inputs[:, [5, 50]] *= loud
    weight[:, [5, 50]] /= loud
    return weight, inputs.T @ inputs / 300


def loss(made, weight, gram):
    error = (made.dequantize() - weight).double()
    return float((error @ gram.double() * error).sum())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [12, 16, 48])
def test_each_way_is_rounding_to_nearest_of_the_weight_or_its_transpose(group, symmetric):
    weight, gram = problem()
    options = {"bits": 3, "group": group, "symmetric": symmetric}
    inputs, outputs = (adadim(weight, gram, along=one, **options) for one in ("inputs", "outputs"))
    assert inputs.dequantize().equal(rtn(weight, **options).dequantize())
    assert outputs.dequantize().equal(rtn(weight.T, **options).dequantize().T)


@pytest.mark.parametrize("loud", [1.0, 30.0])
def test_the_way_with_less_error_is_taken(loud):
    weight, gram = problem(loud=loud)
    best, *ways = (
        adadim(weight, gram, bits=3, group=48, along=one) for one in ("best", "inputs", "outputs")
    )
    losses = [loss(one, weight, gram) for one in ways]
    assert loss(best, weight, gram) == min(losses)
    assert best.outputs == (losses[1] < losses[0])


def test_columns_that_meet_large_inputs_are_rounded_by_themselves():
    weight, gram = problem()
    weight[:, 5] *= 100
    gram[5] /= 100
    gram[:, 5] /= 100
    made = adadim(weight, gram, bits=3, group=48)
    assert made.outputs
    assert made.notes == ("groups lie along the outputs",)
    tame = weight.index_fill(1, torch.tensor([5]), 1.0)
    other = adadim(tame, gram, bits=3, group=48, along="outputs")
    rest = [j for j in range(96) if j != 5]
    assert made.dequantize()[:, rest].equal(other.dequantize()[:, rest])


def test_inputs_win_a_tie_and_where_outputs_do_not_divide():
    weight, gram = problem()
    assert not adadim(torch.zeros_like(weight), gram, bits=3, group=48).outputs
    assert not adadim(weight, gram, bits=3, group=32).outputs
    with pytest.raises(UserError, match="does not divide 48 outputs"):
        adadim(weight, gram, bits=3, group=32, along="outputs")


def test_feedback_along_the_inputs_is_gptq():
    weight, gram = problem()
    made = adadim(weight, gram, bits=3, group=48, along="inputs", feedback=True)
    theirs = gptq(weight, gram, bits=3, group=48, clips=1)
    assert made.dequantize().equal(theirs.dequantize())


def test_feedback_along_the_outputs_matches_the_definition():
    weight, gram = problem()
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(96)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, rounded = weight.double(), torch.zeros(48, 96).double()
    for j in range(96):
        column = rtn(left[:, j].float()[None], bits=3, group=16).dequantize()[0]
        rounded[:, j] = column.double()
        left[:, j:] -= ((left[:, j] - rounded[:, j]) / factor[j, j])[:, None] * factor[j, j:]
    made = adadim(weight, gram, bits=3, group=16, along="outputs", feedback=True)
    torch.testing.assert_close(made.dequantize().double(), rounded, rtol=0, atol=1e-5)
    plain = adadim(weight, gram, bits=3, group=16, along="outputs")
    assert loss(made, weight, gram) < loss(plain, weight, gram)


@pytest.mark.parametrize("along", ["inputs", "outputs"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("shape", "bits", "group"), [((48, 96), 3, 16), ((16, 37), 4, 16), ((1, 5), 9, 1)]
)
def test_stores_itself(along, symmetric, shape, bits, group):
    weight, gram = problem(48, 96)
    weight, gram = weight[: shape[0], : shape[1]], gram[: shape[1], : shape[1]]
    options = {"bits": bits, "group": group, "symmetric": symmetric}
    made = adadim(weight.bfloat16(), gram, along=along, **options)
    parts = made.parts(options)
    layout = Grouped.layout(*shape, options)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == layout
    again = Grouped.read(parts, *shape, options)
    assert again.grid_values().equal(made.grid_values())
    assert again.outputs == made.outputs
    stored = sum(part.numel() * part.element_size() * 8 for part in parts.values())
    assert made.bits_per_weight() <= stored / weight.numel()


def test_refuses_ways_that_there_are_not():
    with pytest.raises(UserError, match="along"):
        adadim(*problem(), bits=3, along="rows")


def test_refuses_statistics_that_are_no_numbers():
    weight, gram = problem()
    gram[3, 3] = torch.nan
    with pytest.raises(UserError, match="statistics"):
        adadim(weight, gram, bits=3)


@pytest.mark.parametrize("along", ["inputs", "outputs"])
def test_the_loaded_model_is_the_one_in_memory(along, llama, tmp_path):
    report = lw.compress(
        llama, tmp_path / "out", bits=4, group=16, method="adadim", calibration="builtin",
        cache=False, format="layerwise", options={"quantize/adadim": {"along": along}}, **QUICK,
    )  # fmt: skip
    assert report.proof is not None
    assert report.proof.largest_difference <= report.proof.allowed


@pytest.mark.trained
@pytest.mark.parametrize("outliers", [1.0, 30.0])
def test_on_a_trained_model_it_beats_either_way_for_all_layers(outliers):
    totals = dict.fromkeys(("best", "inputs", "outputs"), 0.0)
    for one in layers(outliers=outliers):
        gram = one.evidence["gram"]
        energy = loss(rtn(torch.zeros_like(one.weight), bits=1), one.weight, gram)
        for along in totals:
            made = adadim(one.weight, gram, bits=3, group=64, along=along)
            totals[along] += loss(made, one.weight, gram) / energy
    least = min(totals["inputs"], totals["outputs"])
    assert totals["best"] <= least
    assert outliers == 1 or totals["best"] < least
