import pytest
import torch

from layerwise.core.errors import UserError
from layerwise.prune.magnitude import magnitude
from layerwise.prune.wanda import wanda


def _gram(inputs):
    return inputs.T @ inputs / len(inputs)


def test_keeps_the_highest_scores_in_each_row():
    weight, inputs = torch.randn(8, 20), torch.randn(50, 20) * torch.rand(20)
    scores = weight.abs() * inputs.norm(dim=0)
    by_hand = scores >= scores.topk(7, dim=1).values[:, -1:]
    pruned = wanda(weight, _gram(inputs), density=0.35)
    assert torch.equal(pruned.kept, by_hand)
    assert torch.equal(pruned.weight, weight * by_hand)


def test_two_of_four():
    weight, inputs = torch.randn(8, 16), torch.randn(50, 16) * torch.rand(16)
    windows = (weight.abs() * inputs.norm(dim=0)).reshape(8, 4, 4)
    by_hand = windows >= windows.topk(2, dim=2).values[..., -1:]
    pruned = wanda(weight, _gram(inputs), density=0.5, among=4)
    assert torch.equal(pruned.kept, by_hand.reshape(8, 16))


def test_equal_inputs_leave_the_magnitude_of_a_row():
    weight = torch.randn(5, 12)
    by_row = torch.cat([magnitude(row[None], density=0.5).kept for row in weight])
    assert torch.equal(wanda(weight, 3 * torch.eye(12), density=0.5).kept, by_row)


def test_moving_scale_from_weights_to_inputs_changes_nothing():
    weight, inputs = torch.randn(5, 12), torch.randn(30, 12)
    scale = 2.0 ** torch.arange(-6, 6)
    moved = wanda(weight / scale, _gram(inputs * scale), density=0.5)
    assert torch.equal(moved.kept, wanda(weight, _gram(inputs), density=0.5).kept)


def test_says_so_when_no_input_was_seen():
    weight = torch.randn(5, 12)
    blind = wanda(weight, torch.zeros(12, 12), density=0.5)
    assert torch.equal(blind.kept, wanda(weight, torch.eye(12), density=0.5).kept)
    assert "no input was seen" in blind.notes[0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_refuses_statistics_that_are_no_numbers(value):
    gram = torch.eye(12)
    gram[3, 3] = value
    with pytest.raises(UserError, match="statistics"):
        wanda(torch.randn(5, 12), gram, density=0.5)
