import pytest
import torch

from layerwise.compensate.eora import eora
from layerwise.compensate.svd import svd
from layerwise.core.errors import UserError


def _layer(tokens=200):
    noise = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=noise, dtype=torch.float64)

    inputs = randn(tokens, 20) @ randn(20, 20) * randn(20).exp()
    return randn(12, 20), randn(12, 20), inputs


def test_leaves_the_singular_values_after_rank_of_the_output_error():
    weight, approximation, inputs = _layer()
    error = weight - approximation
    correction = eora(weight, approximation, inputs.T @ inputs / len(inputs), rank=5)
    left_over = (error - correction.product()) @ inputs.T
    expected = torch.linalg.svdvals(error @ inputs.T)[5:].square().sum()
    torch.testing.assert_close(left_over.square().sum(), expected, rtol=1e-8, atol=0)
    assert correction.notes == ()


def test_equal_uncorrelated_inputs_leave_plain_svd():
    weight, approximation, _ = _layer()
    gram = 3 * torch.eye(20, dtype=torch.float64)
    ours = eora(weight, approximation, gram, rank=4).product()
    torch.testing.assert_close(ours, svd(weight, approximation, rank=4).product())


def test_beats_any_other_correction_of_its_rank_on_the_inputs_it_saw():
    weight, approximation, inputs = _layer()
    error = weight - approximation
    best = eora(weight, approximation, inputs.T @ inputs / len(inputs), rank=3)
    plain = svd(weight, approximation, rank=3)

    def loss(product):
        return float(((error - product) @ inputs.T).norm())

    nudged = [
        (best.left + 0.01 * torch.randn(12, 3)) @ (best.right + 0.01 * torch.randn(3, 20))
        for _ in range(20)
    ]
    assert all(loss(best.product()) < loss(other) for other in (plain.product(), *nudged))


def test_does_nothing_where_no_input_went():
    weight, approximation, inputs = _layer(tokens=8)
    gram = inputs.T @ inputs / len(inputs)
    correction = eora(weight, approximation, gram, rank=8)
    left_over = (weight - approximation - correction.product()) @ inputs.T
    assert left_over.norm() < 1e-2 * ((weight - approximation) @ inputs.T).norm()
    unseen = torch.linalg.eigh(gram).eigenvectors[:, :12]
    assert (correction.product() @ unseen).abs().max() < 1e-6
    assert "12 of 20" in correction.notes[0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_refuses_statistics_that_are_no_numbers(value):
    weight, approximation, _ = _layer()
    gram = torch.eye(20)
    gram[3, 3] = value
    with pytest.raises(UserError, match="statistics"):
        eora(weight, approximation, gram, rank=4)
