import pytest
import torch

from layerwise.measure.zd import zd


def test_is_minus_the_share_above_one_deviation_of_all_weights_pooled():
    weights = [torch.randn(8, 16), 3 * torch.randn(30, 8) + 1]
    pooled = torch.cat([weight.flatten() for weight in weights]).double()
    z = (pooled - pooled.mean()) / pooled.std(correction=0)
    assert zd(weights) == pytest.approx(-float((z > 1).double().mean()))


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, -7.7, 1e-20])
def test_equal_weights_never_stand_out(value):
    assert zd([torch.full((33, 7), value), torch.full((3, 7), value)]) == 0
