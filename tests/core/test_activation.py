"""Inputs rounded while a model runs: checked against the definition, written slowly."""

import pytest
import torch

from layerwise.core.activation import SCHEMES, Activation
from layerwise.quantize.rtn import rtn

NOISE = torch.Generator().manual_seed(0)
INPUTS = torch.randn(40, 96, generator=NOISE)
WEIGHT = torch.randn(24, 96, generator=NOISE)


@pytest.mark.parametrize(("scheme", "top"), [("int8", 127), ("int4", 7)])
def test_each_token_has_its_own_step(scheme, top):
    rounded = Activation.of(scheme, None).rounded(INPUTS)
    for token, answer in zip(INPUTS, rounded, strict=True):
        step = float(token.abs().max()) / top
        expected = torch.tensor([round(float(x) / step) * step for x in token])
        torch.testing.assert_close(answer, expected)


def test_one_step_for_all_tokens_clips_what_lies_beyond_it():
    peak = torch.full((96,), 2.0)
    rounded = Activation.of("int8-static", peak).rounded(torch.tensor([[1.0, 2.0, 30.0, -30.0]]))
    torch.testing.assert_close(
        rounded, torch.tensor([[round(63.5) / 63.5, 2.0, 2.0, -2.0 * 128 / 127]])
    )


def test_floats_are_those_of_torch():
    rounded = Activation.of("fp8", None).rounded(INPUTS)
    step = INPUTS.abs().amax(dim=1, keepdim=True) / 448
    expected = (INPUTS / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step
    torch.testing.assert_close(rounded, expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tokens_of_zeros_stay_zero(scheme):
    rounded = Activation.of(scheme, torch.zeros(96)).rounded(torch.zeros(3, 96))
    assert torch.equal(rounded, torch.zeros(3, 96))


@pytest.mark.parametrize("group", [96, 32, 40])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "scheme"), [(8, "int8"), (4, "int8"), (4, "int4"), (8, "fp8")])
def test_whole_numbers_are_multiplied_as_such(group, symmetric, bits, scheme):
    coded = rtn(WEIGHT, bits=bits, group=group, symmetric=symmetric)
    activation = Activation.of(scheme, None)
    answer = coded.with_activation(activation).answer(INPUTS)
    expected = activation.rounded(INPUTS).double() @ coded.dequantize().double().T
    torch.testing.assert_close(answer.double(), expected, rtol=1e-5, atol=1e-5)


def test_sums_of_wide_groups_stay_exact():
    width = 5000  # the largest sums of codes are beyond 2^24
    inputs, weight = torch.full((1, width), 1.0), torch.full((1, width), 1.0)
    weight[0, 0] = 0.5
    coded = rtn(weight, bits=8, group=width).with_activation(Activation.of("int8", None))
    codes, step = coded.activation.codes(inputs)
    whole = int((codes.long() * (coded.codes.long() - coded.zero.long())).sum())
    assert whole > 2**24
    expected = whole * float(step) * float(coded.scale.float())
    assert float(coded.answer(inputs)) == pytest.approx(expected, rel=1e-7)
