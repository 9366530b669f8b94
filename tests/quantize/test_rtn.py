import pytest
import torch

from layerwise.quantize.rtn import rtn


def test_matches_torch_fake_quantize_row_by_row():
    weight = torch.randn(6, 32)
    ours = rtn(weight, bits=4, group=32)
    theirs = torch.fake_quantize_per_channel_affine(
        weight, ours.scale[:, 0].float(), ours.zero[:, 0], axis=0, quant_min=0, quant_max=15
    )
    torch.testing.assert_close(ours.dequantize(), theirs)


@pytest.mark.parametrize("symmetric", [False, True])
def test_each_code_is_the_nearest_point_of_its_grid(symmetric):
    weight = torch.randn(4, 300)
    quantized = rtn(weight, bits=3, group=300, symmetric=symmetric)
    grid = (torch.arange(8) - quantized.zero) * quantized.scale.float()  # (out, 8)
    nearest = (weight[..., None] - grid[:, None]).abs().argmin(dim=2)
    assert quantized.codes.equal(nearest.to(torch.uint8))


@pytest.mark.parametrize("seed", range(8))
def test_a_grid_reaches_as_far_as_its_row(seed):
    """Up to half a step: the zero point is rounded to a grid point."""
    weight = torch.randn(1, 4096, generator=torch.Generator().manual_seed(seed))
    quantized = rtn(weight, bits=3, group=4096)
    step = float(quantized.scale)
    lowest, highest = ((edge - int(quantized.zero)) * step for edge in (0, 7))
    assert lowest <= float(weight.min()) + 0.51 * step
    assert highest >= float(weight.max()) - 0.51 * step
    assert len(quantized.codes.unique()) >= 7


def test_counts_scales_and_zeros_as_storage():
    weight = torch.randn(8, 256)
    assert rtn(weight, bits=4).bits_per_weight() == 4 + (16 + 4) / 128
    assert rtn(weight, bits=4, symmetric=True).bits_per_weight() == 4 + 16 / 128


def test_four_symmetric_bits_reach_eight_steps_down_and_seven_up():
    weight = torch.tensor([[-7.5, -7.0, 0.0, 0.4, 6.6, 7.5]])
    quantized = rtn(weight, bits=4, group=6, symmetric=True)
    assert quantized.scale.tolist() == [[1.0]]
    assert quantized.zero.tolist() == [[8]]
    assert quantized.codes.tolist() == [[0, 1, 8, 8, 15, 15]]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_no_weight_moves_by_more_than_half_a_step(bits, symmetric):
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    quantized = rtn(weight, bits=bits, group=32, symmetric=symmetric)
    step = quantized.scale.float().repeat_interleave(32, dim=1)
    assert bool(((quantized.dequantize() - weight).abs() <= step * 0.5001).all())


def test_a_group_as_wide_as_the_row_or_wider_is_one_grid_per_row():
    weight = torch.randn(5, 40)
    whole, wider = rtn(weight, bits=4, group=40), rtn(weight, bits=4, group=1000)
    assert whole.dequantize().equal(wider.dequantize())
    assert wider.scale.shape == (5, 1)


def test_scales_round_up_and_by_no_more_than_bfloat16_must():
    weight = torch.randn(100, 32)
    exact = (weight.amax(1).clamp(min=0) - weight.amin(1).clamp(max=0)) / 15
    stored = rtn(weight, bits=4, group=32).scale[:, 0].float()
    assert bool((stored >= exact).all())
    assert bool((stored <= exact * (1 + 2**-7)).all())
