import pytest
import torch

from layerwise.core.errors import UserError
from layerwise.core.results import float8_points
from layerwise.quantize.fp8 import fp8


def values() -> torch.Tensor:
    """The values of table 1 of the paper, from its equations, by bit pattern; NaN left at 0."""
    made: list[float] = []
    for pattern in range(256):
        sign, exponent, mantissa = pattern >> 7, pattern >> 3 & 15, pattern & 7
        size = 2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8
        made.append(0.0 if pattern & 127 == 127 else -size if sign else size)
    return torch.tensor(made)


def test_points_are_those_of_the_paper():
    assert float8_points().equal(values())
    assert float(float8_points().max()) == 448


def test_codes_are_torch_s_own_cast():
    weight = torch.randn(12, 96)
    ours = fp8(weight, group=32)
    scale = ours.scale.float().repeat_interleave(32, dim=1)
    theirs = (weight / scale).to(torch.float8_e4m3fn)
    assert ours.codes.equal(theirs.view(torch.uint8))
    assert ours.dequantize().equal(theirs.float() * scale)


def test_each_code_is_the_nearest_value():
    weight = torch.randn(4, 50)
    ours = fp8(weight, group=50)
    grid = torch.cat([values()[:127], values()[128:255]])
    reached = (ours.dequantize() - weight).abs()
    nearest = (weight[..., None] - grid * ours.scale.float()[..., None]).abs().amin(dim=2)
    torch.testing.assert_close(reached, nearest)


def test_the_largest_weight_becomes_the_largest_value():
    weight = torch.tensor([[0.0, -448.0, 3.0, 0.001]])
    ours = fp8(weight, group=4)
    assert ours.scale.tolist() == [[1.0]]
    assert ours.dequantize().tolist() == [[0.0, -448.0, 3.0, 0.001953125]]


def test_no_weight_moves_by_more_than_a_sixteenth():
    weight = torch.randn(16, 256)
    moved = (fp8(weight, group=256).dequantize() - weight).abs()
    least = 2.0**-10 * weight.abs().amax(dim=1, keepdim=True) / 448
    assert bool((moved <= (weight.abs() / 16 + least) * 1.01).all())


@pytest.mark.parametrize("bits", [1, 4, 7, 9, 16])
def test_has_no_other_width(bits):
    with pytest.raises(UserError, match="8"):
        fp8(torch.randn(4, 8), bits=bits, group=8)
