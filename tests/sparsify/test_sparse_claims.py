"""What papers claim of blocks and tokens that are left out, on trained models."""

import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import layerwise as lw
from layerwise.core.catalogue import get
from layerwise.core.reading.text import windows
from layerwise.core.running.skipping import skip_blocks
from layerwise.flow.sparsifying import contributions

pytestmark = pytest.mark.trained
LENGTH, PROMPT, WINDOWS = 128, 64, 16


@pytest.fixture(scope="module")
def stories():
    assets = Path(os.environ["LAYERWISE_ASSETS"])
    folder = assets / "models/stories-char-940k"
    source = lw.open(folder).source
    ids = [
        windows(source, assets / f"text/tinystories/{name}.json", samples=count, length=LENGTH).ids
        for name, count in (("train_stories", 32), ("heldout_stories", WINDOWS))
    ]
    return lw.load(folder), *ids


def loss(model, ids, kept):
    """Cross-entropy of what follows the prompt, whose tokens some blocks leave as they are."""
    with skip_blocks(model, get("sparsify/shortv"), kept), torch.no_grad():
        logits = model(ids).logits[:, PROMPT:-1]
    return float(functional.cross_entropy(logits.flatten(0, 1), ids[:, PROMPT + 1 :].flatten()))


def frozen(places, count):
    kept = torch.ones(count, dtype=torch.bool)
    kept[places] = False
    return kept


def test_blocks_that_contribute_least_are_missed_least(stories):
    model, calibration, heldout = stories
    scores = contributions(model, get("sparsify/shortv"), calibration, 0.5)
    count, some = len(scores), len(scores) // 2
    whole = loss(model, heldout, frozen([], count))
    order = scores.argsort()
    least = loss(model, heldout, frozen(order[:some], count)) - whole
    most = loss(model, heldout, frozen(order[-some:], count)) - whole
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randperm(count, generator=generator)[:some] for _ in range(10)]
    drawn = [loss(model, heldout, frozen(places, count)) - whole for places in draws]
    assert most > 0.01  # freezing hurts
    assert least < most
    assert least <= 0.7 * sum(drawn) / len(drawn)
