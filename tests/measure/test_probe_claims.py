"""What the papers on probes claim, on trained models and real labels, against random weights."""

import functools
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import layerwise as lw

ASSETS = os.environ.get("LAYERWISE_ASSETS", "")
pytestmark = pytest.mark.trained
MEASURES = ("mdl_probing", "concept_depth", "feature_weighting")


def _random(model, folder):
    """The same model before training: matrices drawn anew at the deviation that they have."""
    draw = torch.Generator().manual_seed(0)
    source = lw.open(model).source
    shutil.copytree(model, folder)
    tensors = {}
    for name in source.tensors:
        value = source.read(name).float()
        drawn = value.std() * torch.randn(value.shape, generator=draw)
        tensors[name] = drawn if value.dim() > 1 else torch.ones_like(value)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@functools.cache
def _looked(trained):
    """Each measure's numbers on question types, block by block, and what it says of the model."""
    model = Path(ASSETS) / "models/reference-6m"
    labels = Path(ASSETS) / "labelled/trec"
    with tempfile.TemporaryDirectory() as folder:
        path = model if trained else _random(model, Path(folder) / "random")
        found = lw.measure(path, MEASURES, labels=labels, label_examples=600)
        blocks = {one.block: name for name, one in lw.open(path).structure.layers.items()}
    columns = {
        column: [values[name] for name in blocks.values()]
        for column, values in found.columns.items()
    }
    return columns, found.about


@pytest.mark.xfail(strict=True, reason="1.266 against 1.170 with random weights: 1.08 times")
def test_a_trained_model_tells_types_of_questions_in_fewer_bits():
    """The card's threshold: 1.3 times the compression of the same block with random weights."""
    trained, random = (_looked(one)[0]["mdl_probing.compression"] for one in (True, False))
    best = trained.index(max(trained))
    assert trained[best] >= 1.3 * random[best]


def test_the_best_block_reads_them_better_than_random_weights():
    trained, random = (_looked(one)[0]["concept_depth.auc"] for one in (True, False))
    assert max(trained) - max(random) >= 0.05


@pytest.mark.xfail(strict=True, reason="1.08 times in bits, 1.20 times in accuracy")
def test_the_gap_in_bits_is_larger_than_the_gap_in_accuracy():
    trained, random = (_looked(one)[0] for one in (True, False))
    best = max(range(8), key=trained["mdl_probing.compression"].__getitem__)
    gaps = [
        trained[name][best] / random[name][best]
        for name in ("mdl_probing.compression", "mdl_probing.accuracy")
    ]
    assert gaps[0] >= gaps[1]


def test_types_of_questions_take_depth():
    """They are read better after some blocks than after the first."""
    auc = _looked(True)[0]["concept_depth.auc"]
    assert max(auc) > auc[0] + 0.02
