"""Layers of one row, one column or zeros, and densities that would empty a layer."""

import pytest
import torch

import layerwise as lw
from layerwise.core import catalogue
from layerwise.core.errors import UserError
from layerwise.prune.wanda import wanda

PRUNERS = catalogue.methods("prune")
SHAPES = [(1, 8), (8, 1), (1, 1), (2, 2)]


def pruned(method, weight, density):
    inputs = torch.randn(20, weight.shape[1], generator=torch.Generator().manual_seed(1))
    given = {"weight": weight, "gram": inputs.T @ inputs / 20}
    words = {word: given[word] for word in method.evidence}
    return method.run(**words, density=density)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", PRUNERS, ids=lambda method: method.name)
def test_small_layers_keep_about_what_is_asked(method, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for density in (0.25, 0.75, 1.0):
        made = pruned(method, weight, density)
        sets = shape[0] if method.rows == "independent" else 1
        assert abs(int(made.kept.sum()) - density * weight.numel()) <= sets
        assert bool(made.weight.isfinite().all())


@pytest.mark.parametrize("method", PRUNERS, ids=lambda method: method.name)
def test_a_layer_of_zeros_stays_zeros(method):
    made = pruned(method, torch.zeros(6, 8), 0.5)
    assert not made.weight.any()
    assert int(made.kept.sum()) == 24


def test_rows_that_would_be_emptied_keep_one_weight():
    made = wanda(torch.randn(5, 8), torch.eye(8), density=0.05)
    assert made.kept.sum(dim=1).tolist() == [1] * 5
    assert made.notes == ("a density of 0.05 would empty rows of 8 inputs: one stays",)
    assert not wanda(torch.randn(5, 8), torch.eye(8), density=0.5).notes


@pytest.mark.parametrize("method", PRUNERS, ids=lambda method: method.name)
def test_a_pattern_of_none_is_refused(method):
    with pytest.raises(UserError, match="of every 4"):
        method.run(
            **{w: {"weight": torch.randn(4, 8), "gram": torch.eye(8)}[w] for w in method.evidence},
            density=1e-8,
            among=4,
        )


def test_a_layer_that_would_be_emptied_is_refused_before_any_work(llama, tmp_path):
    with pytest.raises(UserError, match=r"density 1e-06 is not possible"):
        lw.compress(llama, tmp_path / "out", density=1e-6, proof="none")
    assert not (tmp_path / "out").exists()
