"""UDFC's scales against least squares found the slow way, and on nets whose inputs nobody shows."""

import pytest
import small_cnn
import torch
import trained

from layerwise.quantize.rtn import rtn
from layerwise.quantize.udfc import udfc

WEIGHT = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
GRID = {"group": 40, "symmetric": True}


def _error(made, weight=WEIGHT):
    return (made.dequantize() - weight).square().sum(dim=1)


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("group", [16, 40])
def test_no_other_scale_of_a_channel_errs_less(bits, group):
    plain = rtn(WEIGHT, bits=bits, group=group, symmetric=True)
    made = udfc(WEIGHT, bits=bits, group=group)
    assert torch.equal(made.codes, plain.codes)
    for row in range(len(WEIGHT)):
        whole, rounded = WEIGHT[row].double(), plain.dequantize()[row].double()
        tried = torch.linspace(0.8, 1.1, 30001, dtype=torch.float64)
        errors = (whole - tried[:, None] * rounded).square().sum(dim=1)
        best = float(tried[errors.argmin()])
        share = made.scale[row].double() / plain.scale[row].double()
        assert torch.allclose(share, torch.full_like(share, best), atol=2**-8)


def test_channels_err_less_than_rounded_ones():
    assert bool((_error(udfc(WEIGHT, bits=3, **GRID)) <= _error(rtn(WEIGHT, bits=3, **GRID))).all())


@pytest.mark.parametrize("bits", [1, 2])
def test_few_bits_are_rounded_and_no_more(bits):
    grid = {"bits": bits, "group": 40, "symmetric": bits > 1}
    made, plain = udfc(WEIGHT, **grid), rtn(WEIGHT, **grid)
    assert torch.equal(made.dequantize(), plain.dequantize())


def test_many_bits_leave_the_weight():
    made = udfc(WEIGHT, bits=16, **GRID).dequantize()
    assert torch.allclose(made, WEIGHT, atol=1e-3)


def test_awkward_channels():
    weight = WEIGHT.clone()
    weight[3] = 0
    weight[4] *= 1e-30
    weight[5] *= 1e30
    made = udfc(weight, bits=4, **GRID)
    assert not made.dequantize()[3].any()
    assert bool(made.dequantize().isfinite().all())
    assert bool((_error(made, weight)[:3] < 0.02 * weight[:3].square().sum(dim=1)).all())
    for dtype in (torch.float16, torch.bfloat16):
        assert udfc(WEIGHT[:1].to(dtype), bits=4, group=16).scale.shape == (1, 3)


@pytest.mark.trained
def test_trained_layers_err_less_than_rounded_ones():
    for one in trained.layers()[:7]:
        grid = {"bits": 3, "group": one.weight.shape[1], "symmetric": True}
        learned, plain = (
            float(_error(method(one.weight, **grid), one.weight).sum()) for method in (udfc, rtn)
        )
        assert learned < plain, one.layer.name


@pytest.mark.parametrize("bits", [4, 6])
def test_a_convolutional_net_is_no_worse_for_it(bits, tmp_path):
    """The card's finding; at 3 bits this net falls from 0.945 to 0.931, unlike the card's."""
    made = small_cnn.digits()
    plain, _ = small_cnn.compressed(made, tmp_path / "rtn", bits=bits, symmetric=True)
    scaled, _ = small_cnn.compressed(made, tmp_path / "udfc", bits=bits, method="udfc")
    assert made.accuracy(scaled) >= made.accuracy(plain) - 0.01
