import math

import pytest
import torch

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.quantize.fireq import fireq
from layerwise.quantize.rtn import rtn

QUICK = {"text": "builtin", "text_samples": 2, "length": 32, "samples": 4, "noise_floor": False}


def problem(rows=12, width=64, spread=1.0):
    noise = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=noise)
    return weight * torch.logspace(-spread, spread, width)


def floats():
    """Every 8-bit float from 2^-9 to 448, from the definition of E4M3."""
    made = [m / 8 * 2.0**-6 for m in range(1, 8)]
    made += [2.0 ** (e - 7) * (1 + m / 8) for e in range(1, 16) for m in range(8)]
    return torch.tensor(made[:-1]).double()


def by_definition(weight, group):
    """Group by group, with the nearest of all 8-bit floats for a scale."""
    times = 2.0 ** math.floor(math.log2(448 / float(weight.abs().max())))
    made = torch.zeros_like(weight).double()
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], group):
            part = weight[row, start : start + group].double() * times
            wanted = part.abs().max() / 7
            scale = floats()[(floats() - wanted).abs().argmin()]
            codes = (part / scale).round().clamp(-8, 7)
            made[row, start : start + group] = codes * scale / times
    return made


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e5])
@pytest.mark.parametrize("group", [16, 24, 64])
def test_matches_the_definition(factor, group):
    weight = factor * problem()
    ours = fireq(weight, group=group, scaling=False)
    torch.testing.assert_close(ours.dequantize().double(), by_definition(weight, group))


def test_columns_are_evened_out_to_one_mean():
    weight = problem()
    ours = fireq(weight, group=16)
    mean = (weight * ours.input_scale).abs().mean(dim=0)
    torch.testing.assert_close(mean, weight.abs().mean().expand(64))
    assert ours.grid_values().equal(
        fireq(weight * ours.input_scale, group=16, scaling=False).grid_values()
    )


def test_columns_that_are_even_already_are_left_alone():
    weight = problem().sign()
    assert fireq(weight, group=16).input_scale.equal(torch.ones(64))


def test_without_a_feeder_nothing_is_scaled():
    weight = problem()
    alone = fireq(weight, group=16, fold=False)
    assert alone.input_scale is None
    assert alone.codes.equal(fireq(weight, group=16, scaling=False).codes)


def test_scales_are_eight_bit_floats_times_one_power_of_two():
    weight = 1e-3 * problem(spread=2.0)
    ours = fireq(weight, group=8, scaling=False)
    times = 2.0 ** math.floor(math.log2(448 / float(weight.abs().max())))
    scale = ours.scale.float() * times
    assert scale.equal(scale.to(torch.float8_e4m3fn).float())
    assert float((weight * times).abs().max()) <= 448 < float((2 * weight * times).abs().max())
    assert float(scale.min()) >= 2.0**-9


def test_a_scale_is_at_most_a_sixteenth_off():
    weight = problem()
    ours = fireq(weight, group=16, scaling=False).scale.float()
    exact = weight.reshape(12, -1, 16).abs().amax(dim=2) / 7
    assert float((ours / exact - 1).abs().max()) <= 1 / 16


def test_inputs_are_eight_bit_floats():
    weight, inputs = problem(), torch.randn(10, 64)
    ours = fireq(weight, group=16, scaling=False)
    step = inputs.abs().amax(dim=1, keepdim=True) / 448
    rounded = (inputs / step).to(torch.float8_e4m3fn).double() * step
    torch.testing.assert_close(
        ours.answer(inputs).double(), rounded @ ours.dequantize().double().T, rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("weight", [torch.zeros(3, 16), 1e-38 * torch.ones(3, 16)])
def test_layers_of_next_to_nothing(weight):
    for scaling in (False, True):
        ours = fireq(weight, group=8, scaling=scaling)
        assert bool(ours.dequantize().isfinite().all())
        assert bool(ours.scale.isfinite().all())
        assert float(ours.dequantize().abs().max()) <= 1.2e-38


def test_a_dead_column_has_no_part_in_it():
    weight = problem()
    weight[:, 5] = 0.0
    ours = fireq(weight, group=16)
    assert float(ours.input_scale[5]) == 1.0
    assert not ours.dequantize()[:, 5].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_awkward_layers_come_back_as_they_were_stored(dtype):
    weight = problem(rows=1, width=37).to(dtype)
    ours = fireq(weight, group=16, scaling=False)
    told = {"bits": 4, "group": 16, "symmetric": True, "codes": "integer"}
    again = type(ours).read(ours.parts(told), 1, 37, told)
    assert again.grid_values().equal(ours.grid_values())


@pytest.mark.parametrize("bits", [2, 8])
def test_has_no_other_width(bits):
    with pytest.raises(UserError, match="4"):
        fireq(problem(), bits=bits, group=16)


def test_is_close_to_rounding_with_scales_of_sixteen_bits():
    weight = problem(spread=0.0)
    ours, theirs = (
        float((made.dequantize() - weight).square().sum())
        for made in (
            fireq(weight, group=16, scaling=False),
            rtn(weight, bits=4, group=16, symmetric=True),
        )
    )
    assert ours <= 1.3 * theirs


def test_the_loaded_model_is_the_one_in_memory(llama, tmp_path):
    report = lw.compress(llama, tmp_path / "out", bits=4, group=16, method="fireq", **QUICK)
    assert {row.method for row in report.layers} == {"fireq"}
    again = lw.evaluate(str(tmp_path / "out"), against=llama, text="builtin", samples=2, length=32)
    assert again.text.kl == pytest.approx(report.comparison.kl, rel=1e-3)
