import pytest
import torch

from layerwise.core.errors import UserError
from layerwise.measure.owl import owl


def _block():
    weights = [torch.randn(8, 16) ** 3, torch.randn(30, 9) ** 3]
    return weights, [torch.rand(16), 4 * torch.rand(9) ** 2]


@pytest.mark.parametrize("outlier", [1.0, 3.0, 5.0, 7.0])
def test_is_the_share_of_scores_above_so_many_times_the_mean(outlier):
    weights, norms = _block()
    scores = [
        abs(float(w[row, column])) * float(norm[column])
        for w, norm in zip(weights, norms, strict=True)
        for row in range(w.shape[0])
        for column in range(w.shape[1])
    ]
    mean = sum(scores) / len(scores)
    expected = sum(score > outlier * mean for score in scores) / len(scores)
    assert expected > 0
    assert owl(weights, norms, outlier=outlier) == expected


def test_planted_outliers_raise_it():
    weights, norms = [torch.randn(40, 100)], [torch.ones(100)]
    planted = weights[0].clone()
    planted[:, 7] *= 20
    assert owl([planted], norms) > owl(weights, norms)


def test_a_block_that_does_nothing_has_no_outliers():
    assert owl([torch.randn(4, 6)], [torch.zeros(6)]) == 0
    assert owl([torch.zeros(4, 6), torch.zeros(2, 3)], [torch.ones(6), torch.ones(3)]) == 0


def test_half_precision_does_not_overflow():
    weight = torch.full((4, 8), 6e4, dtype=torch.float16)
    weight[:, 1:] = 1.0
    assert owl([weight], [torch.full((8,), 1e4)]) == 4 / 32


def test_refuses_a_factor_that_is_none():
    with pytest.raises(UserError, match="outlier 0"):
        owl([torch.ones(2, 2)], [torch.ones(2)], outlier=0.0)
