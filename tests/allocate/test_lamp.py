import pytest
import torch

from layerwise.allocate.lamp import _scores, lamp
from layerwise.core.errors import UserError


def _every_count(weights):
    return [torch.arange(weight.numel() + 1) for weight in weights]


def _by_definition(weight):
    squares = weight.flatten().double().square()
    return torch.stack([u / squares[squares >= u].sum() for u in squares])


def test_scores_match_their_definition():
    weight = torch.randn(5, 7)
    expected = _by_definition(weight).sort(descending=True).values
    torch.testing.assert_close(_scores(weight), expected)


@pytest.mark.parametrize("budget", [3, 10, 77, 200])
def test_keeps_the_highest_scores_of_all_layers_together(budget):
    weights = [torch.randn(5, 7), 100 * torch.randn(10, 9) ** 3, torch.randn(3, 5, 5) + 1]
    pooled = torch.cat([_by_definition(weight) for weight in weights])
    owner = torch.arange(3).repeat_interleave(torch.tensor([35, 90, 75]))
    # A first place is a tie of all layers, which any budget of three or more settles.
    expected = owner[pooled.topk(budget).indices].bincount(minlength=3)
    assert torch.equal(lamp(weights, _every_count(weights), budget=budget), expected)


def test_coarse_levels_are_cut_at_one_threshold():
    weights = [torch.randn(40, 40), torch.randn(60, 20) ** 3]
    costs = [torch.arange(0, weight.numel() + 1, 100) for weight in weights]
    levels = lamp(weights, costs, budget=1500).tolist()
    taken, next_one = (
        [float(_scores(w)[100 * (k + more) - 1]) for w, k in zip(weights, levels, strict=True)]
        for more in (0, 1)
    )
    assert 1400 < 100 * sum(levels) <= 1500
    assert min(taken) >= max(next_one)


def test_rescaling_a_layer_changes_nothing():
    first, second = torch.randn(2, 20, 20)
    costs = _every_count([first, second])
    rescaled = lamp([first, 64 * second], costs, budget=160)
    assert torch.equal(lamp([first, second], costs, budget=160), rescaled)


def test_a_layer_is_never_pruned_away():
    tiny, huge = torch.randn(4, 4), torch.randn(400, 400)
    assert lamp([tiny, huge], _every_count([tiny, huge]), budget=160)[0] >= 1


def test_a_layer_of_zeros_gets_what_is_left():
    weights = [torch.zeros(4, 5), torch.randn(4, 5)]
    assert lamp(weights, _every_count(weights), budget=25).tolist() == [5, 20]


def test_refuses_levels_that_keep_more_than_there_is():
    with pytest.raises(UserError, match="item 1 has 6 weights"):
        lamp([torch.ones(9), torch.ones(6)], [torch.tensor([1, 9])] * 2, budget=9)
