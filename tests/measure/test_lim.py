import pytest
import torch
from torch.nn import functional

from layerwise.measure.lim import lim


def test_is_minus_the_mean_cosine():
    inputs, outputs = torch.randn(2, 50, 16)
    by_definition = -functional.cosine_similarity(inputs, outputs, dim=1).mean()
    assert lim(inputs, outputs) == pytest.approx(float(by_definition), abs=1e-6)


def test_a_block_that_does_nothing_scores_least():
    inputs = torch.randn(50, 16)
    assert lim(inputs, inputs) == pytest.approx(-1)
    assert lim(inputs, -3 * inputs) == pytest.approx(1)


def test_tokens_of_any_size_count_the_same():
    inputs, outputs = torch.randn(2, 6, 16)
    size = torch.tensor([1e-30, 1e-10, 1.0, 1e10, 1e30, 0.0])[:, None]
    expected = lim(inputs[:5], outputs[:5]) * 5 / 6
    assert lim(inputs * size, outputs * size) == pytest.approx(expected, abs=1e-6)
