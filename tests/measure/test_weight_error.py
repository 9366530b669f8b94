import pytest
import torch

from layerwise.measure.error import error
from layerwise.measure.weight_error import weight_error


def test_is_the_output_error_for_uncorrelated_inputs():
    weight, approximation = torch.randn(2, 8, 16)
    expected = error(weight, approximation, 7 * torch.eye(16))
    assert weight_error(weight, approximation) == pytest.approx(expected)


def test_a_layer_of_zeros_is_right_or_wrong():
    nothing = torch.zeros(3, 4)
    assert weight_error(nothing, nothing) == 0
    assert weight_error(nothing, nothing + 1) == 1
