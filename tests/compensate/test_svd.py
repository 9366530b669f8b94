import torch

from layerwise.compensate.svd import svd


def test_leaves_the_singular_values_after_rank():
    weight, approximation = torch.randn(2, 12, 20, dtype=torch.float64)
    error = weight - approximation
    left_over = error - svd(weight, approximation, rank=5).product()
    expected = torch.linalg.svdvals(error)[5:]
    torch.testing.assert_close(torch.linalg.svdvals(left_over)[:7], expected)


def test_both_factors_carry_the_same_weight():
    weight, approximation = torch.randn(2, 12, 20)
    correction = svd(weight, approximation, rank=5)
    torch.testing.assert_close(correction.left.norm(dim=0), correction.right.norm(dim=1))
