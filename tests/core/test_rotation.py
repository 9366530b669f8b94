"""Orthogonal matrices of every size, and products with them that never form them."""

import functools

import pytest
import torch

from layerwise.core.rewriting.rotation import (
    closest_pair,
    hadamard,
    hadamard_orders,
    random_orthogonal,
    rotation,
)

KINDS = ("hadamard", "orthogonal", "kronecker")
# Sizes up to 200 that are multiples of 4 and for which Sylvester and Paley have none.
OTHERS = {92, 116, 156, 172, 184, 188}


@pytest.mark.parametrize("kind", KINDS)
def test_every_size_is_orthogonal_and_applied_as_its_dense_matrix(kind):
    for size in [*range(1, 201), 352, 704, 768]:
        made = rotation(kind, size, seed=size)
        dense = made.dense()
        identity = torch.eye(size, dtype=torch.float64)
        assert (dense @ dense.T - identity).abs().max() < 1e-6, size
        vectors = torch.randn(3, size, dtype=torch.float64)
        torch.testing.assert_close(made.apply(vectors), vectors @ dense, rtol=0, atol=1e-9)
        torch.testing.assert_close(made.invert(vectors), vectors @ dense.T, rtol=0, atol=1e-9)
        whole = functools.reduce(torch.kron, made.factors)
        torch.testing.assert_close(dense, torch.diag(made.signs) @ whole, rtol=0, atol=1e-9)


def test_a_large_size_is_turned_and_turned_back():
    made = rotation("hadamard", 11008)
    assert hadamard_orders(11008) == ((2, 16, 344), 1)
    vectors = torch.randn(4, 11008)
    turned = made.apply(vectors)
    torch.testing.assert_close(turned.norm(dim=1), vectors.norm(dim=1))
    torch.testing.assert_close(made.invert(turned), vectors, rtol=0, atol=1e-5)
    spread = made.apply(torch.eye(11008)[:2])
    torch.testing.assert_close(spread.abs(), torch.full((2, 11008), 11008**-0.5))


@pytest.mark.parametrize("size", [1, 2, *range(4, 201, 4), 344, 352, 704, 768])
def test_hadamard_matrices_of_every_size_that_can_be_made(size):
    made = hadamard(size)
    if size in OTHERS:
        assert made is None
        return
    assert made is not None
    assert torch.equal(made.abs(), torch.ones_like(made))
    assert torch.equal(made @ made.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize(
    ("size", "left"), [(22, 11), (184, 23), (172, 43), (127, 127), (6, 3), (30, 15), (5504, 1)]
)
def test_what_no_hadamard_matrix_divides_is_left_to_a_random_one(size, left):
    orders, rest = hadamard_orders(size)
    assert rest == left
    assert torch.tensor([*orders, rest]).prod() == size


@pytest.mark.parametrize(
    ("size", "pair"),
    [(1, (1, 1)), (7, (1, 7)), (6, (2, 3)), (22, (2, 11)), (64, (8, 8)), (352, (16, 22))],
)
def test_the_closest_pair_of_factors(size, pair):
    assert closest_pair(size) == pair


def test_a_seed_decides_all_that_is_random():
    for kind in KINDS:
        first, again, other = (rotation(kind, 12, seed=seed).dense() for seed in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_random_orthogonal_matrices_have_no_preferred_sign():
    generator = torch.Generator().manual_seed(0)
    corners = torch.stack([random_orthogonal(3, generator)[0, 0] for _ in range(2000)])
    # The first entry of a random unit vector in space is spread evenly over -1 to 1.
    assert abs(float(corners.mean())) < 0.05
    assert abs(float(corners.square().mean()) - 1 / 3) < 0.03


def test_longer_vectors_are_turned_in_pieces():
    made = rotation("hadamard", 8, seed=1)
    vectors = torch.randn(5, 24)
    pieces = [made.apply(piece) for piece in vectors.split(8, dim=1)]
    torch.testing.assert_close(made.apply(vectors), torch.cat(pieces, dim=1))
