import pytest
import torch
from trained import layers

from layerwise.core.errors import UserError
from layerwise.quantize.gptq import gptq
from layerwise.quantize.rsq import _importance, rsq


def problem(rows=20, width=64, windows=6, length=40):
    noise = torch.Generator().manual_seed(0)
    inputs = torch.randn(windows * length, width, generator=noise)
    inputs += inputs[:, :1]
    attention = torch.rand(windows, length, generator=noise).pow(4)
    return torch.randn(rows, width, generator=noise), inputs, attention


def slowly(attention, r_min, power):
    """Window by window, token by token."""
    made = []
    for window in attention.tolist():
        for received in window:
            place = (received - min(window)) / (max(window) - min(window))
            made.append((place * (1 - r_min) + r_min) ** power)
    return torch.tensor(made) / (sum(made) / len(made))


def weighted_loss(rounded, weight, inputs, importance):
    missed = inputs @ (rounded.dequantize() - weight).T
    return float((importance[:, None] * missed.square()).sum())


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("r_min", [0.005, 0.1])
def test_is_gptq_on_weighted_second_moments(power, r_min):
    weight, inputs, attention = problem()
    importance = slowly(attention, r_min, power)
    torch.testing.assert_close(_importance(attention, r_min, power), importance)
    gram = sum(
        r * torch.outer(x, x) for r, x in zip(importance.double(), inputs.double(), strict=True)
    ) / len(inputs)
    ours = rsq(weight, inputs, attention, bits=4, group=32, r_min=r_min, power=power)
    theirs = gptq(weight, gram.float(), bits=4, group=32)
    torch.testing.assert_close(ours.dequantize(), theirs.dequantize(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["alike", "least is most"])
def test_tokens_that_are_alike_leave_gptq(attention):
    weight, inputs, received = problem()
    alike = attention == "alike"
    given = torch.full_like(received, 3.0) if alike else received
    ours = rsq(weight, inputs, given, bits=3, group=32, r_min=0.005 if alike else 1.0)
    theirs = gptq(weight, inputs.T @ inputs / len(inputs), bits=3, group=32)
    assert ours.codes.equal(theirs.codes)
    assert ours.scale.equal(theirs.scale)


def test_more_attention_for_all_changes_nothing():
    weight, inputs, attention = problem()
    once, more = (rsq(weight, inputs, f * attention, bits=3, group=32) for f in (1, 8))
    assert once.codes.equal(more.codes)


def test_an_expert_that_saw_some_tokens_counts_them_alike_and_says_so():
    weight, inputs, attention = problem()
    ours = rsq(weight, inputs[:100], attention, bits=3, group=32)
    theirs = gptq(weight, inputs[:100].T @ inputs[:100] / 100, bits=3, group=32)
    assert ours.codes.equal(theirs.codes)
    assert ours.notes == ("it saw 100 of 240 tokens; each counts alike",)


def test_no_token_at_all_is_rounding_to_nearest():
    weight, inputs, attention = problem()
    ours = rsq(weight, inputs[:0], attention, bits=4, group=32, clips=1)
    assert any("always zero" in note for note in ours.notes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_takes_awkward_layers(dtype):
    weight, inputs, attention = problem(rows=1, width=37)
    ours = rsq(weight.to(dtype), inputs, attention, bits=4, group=16)
    assert bool(ours.dequantize().isfinite().all())


@pytest.mark.parametrize("options", [{"r_min": -0.1}, {"r_min": 2.0}, {"power": 3}])
def test_refuses_what_is_no_weight(options):
    with pytest.raises(UserError):
        rsq(*problem(), bits=4, **options)


def test_refuses_attention_that_is_no_number():
    weight, inputs, attention = problem()
    attention[2, 3] = torch.nan
    with pytest.raises(UserError, match="statistics"):
        rsq(weight, inputs, attention, bits=4)


@pytest.mark.trained
def test_on_a_trained_model_the_tokens_that_matter_are_answered_better():
    """The card's claim: at most 0.97 of GPTQ's weighted error, at 3 bits per row."""
    ours, theirs = 0.0, 0.0
    for one in layers():
        weight, inputs, attention = one.weight, one.inputs, one.evidence["attention"]
        importance = slowly(attention, 0.005, 1)
        whole = float((importance[:, None] * (inputs @ weight.T).square()).sum())
        width = weight.shape[1]
        rounded = rsq(weight, inputs, attention, bits=3, group=width)
        ours += weighted_loss(rounded, weight, inputs, importance) / whole
        rounded = gptq(weight, one.evidence["gram"], bits=3, group=width)
        theirs += weighted_loss(rounded, weight, inputs, importance) / whole
    assert ours <= 0.97 * theirs
