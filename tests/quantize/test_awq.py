import pytest
import torch

from layerwise.core.errors import UserError
from layerwise.quantize.awq import awq
from layerwise.quantize.rtn import rtn


def problem(loud=30.0):
    noise = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 64, generator=noise)
    inputs[:, [3, 40]] *= loud
    weight = torch.randn(24, 64, generator=noise)
    return weight, inputs.T @ inputs / 300, inputs.abs().mean(0), inputs


def test_picks_the_exponent_of_least_output_error():
    weight, gram, magnitude, inputs = problem()
    quantized = awq(weight, gram, magnitude, bits=3, group=32)

    def output_error(alpha):
        scale = magnitude**alpha
        scale = scale / (scale.max() * scale.min()).sqrt()
        rounded = rtn(weight * scale, bits=3, group=32).dequantize() / scale
        return float((inputs @ (rounded - weight).T).square().mean())

    best = min(output_error(k / 20) for k in range(20))
    ours = float((inputs @ (quantized.dequantize() - weight).T).square().mean())
    assert ours == pytest.approx(best, rel=1e-4)
    assert best < 0.5 * output_error(0)


def test_equally_loud_inputs_leave_rounding_as_it_is():
    weight, gram, magnitude, _ = problem()
    quantized = awq(weight, gram, torch.ones_like(magnitude), bits=4)
    assert quantized.input_scale is None
    assert quantized.codes.equal(rtn(weight, bits=4).codes)


def test_one_exponent_is_rounding_to_nearest():
    weight, gram, magnitude, _ = problem()
    quantized = awq(weight, gram, magnitude, bits=3, group=32, grid=1)
    assert quantized.codes.equal(rtn(weight, bits=3, group=32).codes)


def test_layers_of_one_input_share_its_scale():
    weight, gram, magnitude, _ = problem()
    together = awq(weight, gram, magnitude, bits=3, group=32)
    first, second = together.split([8, 16])
    assert first.input_scale.equal(second.input_scale)
    assert torch.cat([first.dequantize(), second.dequantize()]).equal(together.dequantize())


def test_an_input_that_was_never_seen_keeps_its_weights():
    weight, gram, magnitude, _ = problem()
    gram[:, 5] = gram[5] = magnitude[5] = 0.0
    restored = awq(weight, gram, magnitude, bits=8, group=32).dequantize()
    torch.testing.assert_close(restored[:, 5], weight[:, 5], atol=0.1, rtol=0)


@pytest.mark.parametrize("spoilt", [0, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_refuses_statistics_that_are_no_numbers(value, spoilt):
    weight, *statistics, _ = problem()
    statistics[spoilt][3] = value
    with pytest.raises(UserError, match="statistics"):
        awq(weight, *statistics, bits=4)
