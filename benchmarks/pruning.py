"""Half of all weights pruned: the best allocator with SparseGPT against uniform Wanda.

    LAYERWISE_ASSETS=../shared/assets OMP_NUM_THREADS=1 python benchmarks/pruning.py
    LAYERWISE_ASSETS=../shared/assets python benchmarks/pruning.py stories-char-940k owl

Perplexity is that of held-out text that neither training nor calibration saw.  Words choose among
the rows: those that hold all of them are run; uniform Wanda, which the others are compared with, is
always.
"""

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import layerwise as lw

TEXTS = {
    "stories-char-940k": (
        "tinystories/train_stories.json",
        "tinystories/heldout_stories.json",
        0.0,
    ),
    "reference-6m": ("wikitext2/valid.txt", "wikitext2/test.txt", 0.5),
}
BASELINE = "uniform wanda"
HALF: Mapping[str, Any] = {"density": 0.5, "pruner": "sparsegpt"}
WAYS: Mapping[str, Mapping[str, Any]] = {
    BASELINE: {**HALF, "pruner": "wanda"},
    "uniform magnitude": {**HALF, "pruner": "magnitude"},
    "uniform sparsegpt": HALF,
    "owl sparsegpt": {**HALF, "allocate": "stretch", "measure": "owl"},
    "dlp sparsegpt": {**HALF, "allocate": "stretch", "measure": "dlp"},
    "knapsack sparsegpt": {**HALF, "allocate": "knapsack"},
    "ecoflap sparsegpt": {**HALF, "allocate": "ecoflap", "measure": "ecoflap"},
    "2:4 wanda": {"pattern": "2:4", "pruner": "wanda"},
    "2:4 sparsegpt": {"pattern": "2:4", "pruner": "sparsegpt"},
}
WINDOWS, LENGTH = 64, 256


def main(words: list[str]) -> None:
    """Print one line per row, and for each model what the best comes to."""
    for model in TEXTS:
        if any(word in model for word in words) or not any(
            w in one for w in words for one in TEXTS
        ):
            _model(model, [word for word in words if word not in model])


def _model(model: str, words: list[str]) -> None:
    assets = Path(os.environ["LAYERWISE_ASSETS"])
    calibration, heldout, unseen_from = TEXTS[model]
    text: Any = assets / "text" / heldout
    if unseen_from:
        content = text.read_text(encoding="utf-8")
        text = [content[int(unseen_from * len(content)) :]]
    reached: dict[str, float] = {}
    for name, way in WAYS.items():
        if name != BASELINE and not all(word in name for word in words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            report = lw.compress(
                assets / "models" / model,
                Path(folder) / "out",
                calibration=assets / "text" / calibration,
                text=text,
                samples=WINDOWS,
                text_samples=WINDOWS,
                length=LENGTH,
                noise_floor=False,
                proof="auto",
                layer_windows=0,
                **way,
            )
        seen = report.comparison
        assert seen is not None
        reached[name] = seen.perplexity
        kept = sum(row.density * row.rows * row.width for row in report.layers)
        share = kept / sum(row.rows * row.width for row in report.layers)
        print(
            f"{model} {name:22} density {share:.4f}  perplexity {seen.perplexity_before:.3f} -> "
            f"{seen.perplexity:.3f}  KL {seen.kl:.4f}  of {BASELINE} "
            f"{seen.perplexity / reached[BASELINE]:.3f}",
            flush=True,
        )
    best = min(reached, key=lambda name: reached[name])
    print(
        f"{model}: best is {best}, {reached[best]:.3f} against {reached[BASELINE]:.3f} of "
        f"{BASELINE}: {1 - reached[best] / reached[BASELINE]:.1%} lower"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
