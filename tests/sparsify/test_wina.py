import itertools

import pytest
import torch
from torch.nn import functional

from layerwise.core.errors import UserError
from layerwise.sparsify.teal import teal
from layerwise.sparsify.wina import wina


def output_error(weight, inputs, kept):
    return functional.linear(inputs * ~kept, weight).square().sum(dim=1)


def test_is_the_definition():
    inputs, columns = torch.randn(5, 9), torch.rand(9)
    kept = wina(inputs, columns, density=1 / 3)
    for token, mask in zip(inputs, kept, strict=True):
        scores = [abs(float(token[i])) * float(columns[i]) for i in range(9)]
        best = set(sorted(range(9), key=lambda i: -scores[i])[:3])
        assert best == set(mask.nonzero()[:, 0].tolist())


def test_no_mask_errs_less_where_columns_are_orthogonal():
    weight = torch.linalg.qr(torch.randn(12, 8)).Q * torch.rand(8)
    inputs = torch.randn(6, 8)
    kept = wina(inputs, weight.norm(dim=0), density=0.5)
    found = output_error(weight, inputs, kept)
    for chosen in itertools.combinations(range(8), 4):
        mask = torch.zeros(6, 8, dtype=torch.bool)
        mask[:, list(chosen)] = True
        assert bool((found <= output_error(weight, inputs, mask) + 1e-6).all())


def test_columns_of_one_length_make_it_teal():
    inputs = torch.randn(40, 33)
    assert torch.equal(wina(inputs, torch.full((33,), 0.7), density=0.4), teal(inputs, density=0.4))


@pytest.mark.parametrize(("spread", "at_most"), [(0.0, 1.02), (0.3, 0.9), (0.7, 0.5)])
def test_the_card_s_claim_of_one_layer(spread, at_most):
    """The more unequal the columns, the more it gains on what looks at activations alone."""
    weight = torch.randn(512, 256) * (spread * torch.randn(256)).exp()
    inputs = torch.randn(400, 256)
    ours = output_error(weight, inputs, wina(inputs, weight.norm(dim=0), density=0.5)).sum()
    theirs = output_error(weight, inputs, teal(inputs, density=0.5)).sum()
    assert float(ours / theirs) <= at_most


def test_one_input_is_always_kept():
    assert teal(torch.randn(3, 4), density=0.01).sum(dim=1).tolist() == [1, 1, 1]


def test_refuses_a_density():
    with pytest.raises(UserError, match="density 0"):
        wina(torch.randn(3, 4), torch.ones(4), density=0.0)
