"""Layers of trained models and what they see, for checks of another nature than a loss."""

import functools
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import Tensor

import layerwise as lw
from layerwise.core.reading.structure import Layer
from layerwise.core.running.walk import gather
from layerwise.flow.preparing import Texts, prepare
from layerwise.testing.outliers import with_outliers

ASSETS = "LAYERWISE_ASSETS"
WINDOWS, LENGTH = 32, 64
WORDS = frozenset({"gram", "magnitude", "peak", "inputs", "attention"})


class Seen(NamedTuple):
    """A layer, its weight, and what it saw in the original model."""

    layer: Layer
    weight: Tensor
    evidence: dict[str, Tensor]

    @property
    def inputs(self) -> Tensor:
        return self.evidence["inputs"]


@functools.cache
def layers(outliers: float = 1.0) -> tuple[Seen, ...]:
    """Every layer of `bytes-wikitext`, some of its inputs that many times as large."""
    if not os.environ.get(ASSETS):
        pytest.skip(f"{ASSETS} is not set")
    assets = Path(os.environ[ASSETS])
    with tempfile.TemporaryDirectory() as folder:
        model = str(assets / "models/bytes-wikitext")
        if outliers != 1:
            model = str(with_outliers(model, Path(folder) / "outliers", outliers))
        opened = lw.open(model)
        text = str(assets / "text/wikitext2/valid.txt")
        texts = Texts(text, WINDOWS, LENGTH, text, 1, noise_floor=False)
        made = prepare(opened.source, opened.structure, [], texts, needing=["a test"])
        assert made.runner is not None
        assert made.calibration is not None
        hidden = made.runner.start(made.calibration.ids)
        found: list[Seen] = []
        for block in made.runner.blocks:
            inside = [one for one in opened.structure.layers.values() if one.block == block]
            seen = gather(made.runner, block, inside, WORDS, hidden)
            for one in inside:
                weight = one.matrix(opened.source.read(one.tensor)).float().clone()
                found.append(Seen(one, weight, dict(seen[one.reads])))
            hidden = made.runner.forward(block, hidden, {})
    return tuple(found)
