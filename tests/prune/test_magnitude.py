import pytest
import torch

from layerwise.core.errors import UserError
from layerwise.prune.magnitude import magnitude


def test_keeps_what_sorting_by_hand_keeps():
    weight = torch.randn(7, 9)
    order = sorted(range(63), key=lambda place: -abs(float(weight.flatten()[place])))
    by_hand = torch.zeros(63, dtype=torch.bool)
    by_hand[order[: round(0.3 * 63)]] = True
    assert torch.equal(magnitude(weight, density=0.3).kept.flatten(), by_hand)


def test_of_equal_weights_the_earlier_stay():
    kept = magnitude(torch.ones(2, 4), density=0.5).kept
    assert kept.tolist() == [[True] * 4, [False] * 4]


def test_two_of_four():
    weight = torch.randn(6, 32)
    windows = weight.abs().reshape(6, 8, 4)
    by_hand = windows >= windows.topk(2, dim=2).values[..., -1:]
    assert torch.equal(magnitude(weight, density=0.5, among=4).kept, by_hand.reshape(6, 32))


@pytest.mark.parametrize(("density", "among"), [(0.5, 5), (0.3, 4), (0.5, -4)])
def test_refuses_windows_that_do_not_fit(density, among):
    with pytest.raises(UserError, match=str(among)):
        magnitude(torch.randn(4, 32), density=density, among=among)
