"""The upper factor of damped second moments."""

import pytest
import torch

from layerwise.core.cholesky import upper_root
from layerwise.core.errors import UserError


@pytest.mark.parametrize("width", [1, 2, 7, 255, 512, 515])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_the_factor(width, dtype):
    inputs = torch.randn(50, width, generator=torch.Generator().manual_seed(0), dtype=dtype)
    gram = inputs.T @ inputs / 50
    before = gram.clone()
    root = upper_root(gram, 0.01)
    assert gram.equal(before)
    assert root.factor.dtype == dtype
    assert not root.factor.tril(-1).any()
    damped = gram.double()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    sizes = damped.diagonal().sqrt()
    # Higham's bound on what a factor misses, of each pair of inputs.
    bound = (width + 1) * torch.finfo(dtype).eps * sizes[:, None] * sizes
    missed = root.factor.double() @ root.factor.double().T - damped
    assert bool((missed.abs() <= bound).all())


def test_what_float32_cannot_tell_from_singular_is_factored_in_float64():
    root = upper_root(torch.ones(2, 2), 1e-9)
    assert root.factor.dtype == torch.float64
    assert not root.notes
    damped = torch.ones(2, 2).double() + 1e-9 * torch.eye(2)
    torch.testing.assert_close(root.factor @ root.factor.T, damped, rtol=0, atol=1e-15)


def test_more_damping_is_said():
    # Its least eigenvalue is -3e-6 before damping.
    gram = torch.tensor([[1.0, 1 + 3e-6], [1 + 3e-6, 1.0]], dtype=torch.float64)
    assert upper_root(gram, 1e-8).notes == (
        "damping raised to 1e-05, for a gram matrix not positive definite",
    )


def test_what_has_no_factor_is_refused():
    with pytest.raises(UserError, match="does not factor"):
        upper_root(torch.tensor([[1.0, 1e9], [1e9, 1.0]]), 1e-9)
