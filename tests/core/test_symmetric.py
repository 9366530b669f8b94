"""Half of a product with a symmetric matrix stands for the whole."""

import pytest
import torch

from layerwise.core.symmetric import PANEL, add_squares, mirror, squared_lengths
from layerwise.quantize._feedback import factorize

WIDTHS = (1, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 9)


@pytest.mark.parametrize("width", WIDTHS)
def test_squares_of_batches(width):
    batches = torch.randn(3, 20, width, generator=torch.Generator().manual_seed(0))
    gram = torch.zeros(width, width)
    for inputs in batches:
        add_squares(gram, inputs)
    mirror(gram)
    whole = batches.flatten(0, 1).double()
    # 60 products are summed, each rounded to 2^-24 of itself.
    room = 60 * 2**-24 * (whole.abs().T @ whole.abs())
    assert bool(((gram.double() - whole.T @ whole).abs() <= room).all())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lengths_of_rows(width, dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, width, generator=generator)
    matrix = torch.randn(7, width, generator=generator, dtype=dtype)
    expected = (matrix.double() @ inputs.double().T).square().sum(dim=1)
    found = squared_lengths(matrix, inputs.T @ inputs)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_no_direction_has_a_length_below_none():
    # Rounding may leave m G m^T below 0 where it is 0.
    inputs = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    across = torch.linalg.qr(inputs.double().T, mode="complete").Q[:, 1:].T.float()
    assert bool((squared_lengths(across, inputs.T @ inputs) >= 0).all())


def test_a_factor_is_kept_as_long_as_its_matrix_is_what_it_was():
    inputs = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    gram = inputs.T @ inputs
    first = factorize(gram, 0.01)
    assert factorize(gram, 0.01) is first
    assert factorize(gram, 0.02) is not first
    gram.mul_(2)
    torch.testing.assert_close(factorize(gram, 0.01).importance, 2 * first.importance)
