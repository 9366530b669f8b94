import pytest
import torch

from layerwise.core.errors import UserError
from layerwise.prune.magnitude import magnitude
from layerwise.prune.sparsegpt import sparsegpt
from layerwise.prune.wanda import wanda


def _layer(rows=24, width=40, seed=0):
    noise = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=noise, dtype=torch.float64)

    shared = randn(600, width // 8) @ randn(width // 8, width)  # (tokens, in)
    inputs = (shared + randn(600, width)) * randn(width).exp()
    return randn(rows, width), inputs.T @ inputs / len(inputs)


def _as_published(weight, gram, density, block, among):
    """Steps 3 to 5 of the official code, inverse and all, with exact counts."""
    weight, rows, width = weight.clone(), *weight.shape
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(width, dtype=gram.dtype)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    result, kept = torch.zeros_like(weight), torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, width, block):
        stop = min(start + block, width)
        current, corner = weight[:, start:stop].clone(), upper[start:stop, start:stop]
        errors = torch.zeros_like(current)
        if not among:
            scores = (current**2 / corner.diagonal() ** 2).flatten()
            count = round(density * rows * stop) - round(density * rows * start)
            chosen = torch.zeros_like(scores, dtype=torch.bool)
            chosen[scores.topk(count).indices] = True
            kept[:, start:stop] = chosen.reshape(rows, -1)
        for i in range(stop - start):
            if among and i % among == 0:
                window = slice(i, i + among)
                scores = current[:, window] ** 2 / corner.diagonal()[window] ** 2
                best = scores.topk(round(density * among), dim=1).indices
                kept[:, start + i : start + i + among].scatter_(1, best, True)
            quantized = current[:, i] * kept[:, start + i]
            result[:, start + i] = quantized
            errors[:, i] = (current[:, i] - quantized) / corner[i, i]
            current[:, i:] -= errors[:, i : i + 1] * corner[i, i:]
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return result, kept


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("block", "among"), [(1, 0), (16, 0), (128, 0), (16, 4), (128, 8)])
def test_matches_the_published_algorithm(block, among, seed):
    weight, gram = _layer(seed=seed)
    pruned = sparsegpt(weight, gram, density=0.5, block=block, among=among)
    result, kept = _as_published(weight, gram, 0.5, block, among)
    assert torch.equal(pruned.kept, kept)
    torch.testing.assert_close(pruned.weight, result, rtol=1e-8, atol=1e-10)


def test_uncorrelated_inputs_leave_magnitude_pruning():
    weight, _ = _layer(width=64)
    pruned = sparsegpt(weight, torch.eye(64), density=0.3)
    assert torch.equal(pruned.kept, magnitude(weight, density=0.3).kept)
    torch.testing.assert_close(pruned.weight, weight * pruned.kept)


def test_loses_less_than_wanda_and_magnitude_on_the_inputs_it_saw():
    weight, gram = _layer(rows=128, width=128)

    def loss(pruned):
        change = pruned.weight - weight
        return float((change @ gram * change).sum())

    ours, by_input, by_size = (
        loss(pruned)
        for pruned in (
            sparsegpt(weight, gram, density=0.5),
            wanda(weight, gram, density=0.5),
            magnitude(weight, density=0.5),
        )
    )
    assert ours < 0.6 * by_input
    assert ours < 0.2 * by_size


def test_damps_more_and_says_so_when_the_gram_does_not_factor():
    weight, _ = _layer()
    token = torch.arange(1, 41, dtype=torch.float64)
    gram = torch.outer(token, token) - 0.001 * torch.eye(40)
    pruned = sparsegpt(weight, gram, density=0.5, damping=1e-6)
    assert "damping raised to 1e-05" in pruned.notes[0]
    assert pruned.weight.isfinite().all()


def test_refuses_a_gram_that_never_factors():
    weight, gram = _layer()
    hollow = torch.full_like(gram, 1e12).fill_diagonal_(1.0)
    with pytest.raises(UserError, match="does not factor, even with damping 100000"):
        sparsegpt(weight, hollow, density=0.5)


def test_dead_inputs_have_no_part_in_the_damping():
    weight, gram = _layer(width=64)
    wide, padded = torch.zeros(24, 96).double(), torch.zeros(96, 96).double()
    wide[:, :64], padded[:64, :64] = weight, gram
    # Two of three inputs live: three quarters of those are half of them all.
    ours = sparsegpt(wide, padded, density=0.5, block=96)
    theirs = sparsegpt(weight, gram, density=0.75, block=64)
    assert torch.equal(ours.kept[:, :64], theirs.kept)
    torch.testing.assert_close(ours.weight[:, :64], theirs.weight)


@pytest.mark.parametrize(
    "options", [{"damping": 0.0}, {"damping": -1.0}, {"damping": torch.nan}, {"block": 0}]
)
def test_refuses_options_out_of_range(options):
    with pytest.raises(UserError, match=next(iter(options))):
        sparsegpt(*_layer(), density=0.5, **options)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_refuses_statistics_that_are_no_numbers(value):
    weight, gram = _layer()
    gram[3, 3] = value
    with pytest.raises(UserError, match="statistics"):
        sparsegpt(weight, gram, density=0.5)


def test_says_so_when_no_input_was_seen():
    weight, gram = _layer()
    blind = sparsegpt(weight, 0 * gram, density=0.5)
    assert torch.equal(blind.kept, magnitude(weight, density=0.5).kept)
    assert "no input was seen" in blind.notes[0]
