import pytest
import torch

from layerwise.measure.dlp import dlp


def _definition(weights, norms):
    parts = [(w.float().abs() * n).flatten() for w, n in zip(weights, norms, strict=True)]
    pooled = sorted(torch.cat(parts).tolist())
    return -pooled[(len(pooled) - 1) // 2]


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e20])
def test_is_minus_the_median_of_all_scores_pooled(scale):
    for rows in (1, 2, 7, 40):
        weights = [scale * torch.randn(rows, 16), torch.randn(3, 9) ** 3, torch.randn(1, 1)]
        norms = [torch.rand(16), 4 * torch.rand(9), torch.ones(1)]
        assert dlp(weights, norms) == _definition(weights, norms)


def test_equal_scores_are_their_own_median():
    assert dlp([torch.full((33, 7), -0.3)], [torch.full((7,), 2.0)]) == pytest.approx(-0.6)


def test_inputs_that_are_never_seen_count():
    norms = torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert dlp([torch.ones(5, 4)], [norms]) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_it_is(dtype):
    weights, norms = [torch.randn(9, 16).to(dtype)], [torch.rand(16)]
    assert dlp(weights, norms) == _definition(weights, norms)


def test_a_block_that_does_more_is_less_important():
    weights, norms = [torch.randn(9, 16)], [torch.rand(16)]
    assert dlp([3 * weights[0]], norms) < dlp(weights, norms)
