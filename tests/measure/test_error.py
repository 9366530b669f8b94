import pytest
import torch

from layerwise.measure.error import error


def test_is_the_relative_error_of_the_outputs():
    weight, approximation = torch.randn(2, 8, 16)
    inputs = torch.randn(50, 16) * torch.rand(16)
    missed = ((weight - approximation) @ inputs.T).square().sum()
    whole = (weight @ inputs.T).square().sum()
    measured = error(weight, approximation, inputs.T @ inputs / len(inputs))
    assert measured == pytest.approx(float(missed / whole), rel=1e-5)


def test_a_layer_that_answers_nothing_is_right_or_wrong():
    nothing, gram = torch.zeros(3, 4), torch.eye(4)
    assert error(nothing, nothing, gram) == 0
    assert error(nothing, nothing + 1e-3, gram) == 1
    assert error(nothing + 1, nothing, 0 * gram) == 0


def test_answering_nothing_is_wrong_by_everything():
    weight = torch.randn(3, 4)
    assert error(weight, torch.zeros(3, 4), torch.eye(4)) == 1
