"""Pruning before rounding, and rounding before pruning: what each does to a model, and both.

    LAYERWISE_ASSETS=../shared/assets OMP_NUM_THREADS=1 python benchmarks/order.py

Half of the weights are pruned, by three methods, and rounded to 4 bits by GPTQ in groups of 32.
layerwise prunes a layer before it rounds it; the other order is a run that prunes what another run
has rounded.  Perplexity on held-out text (stories-char-940k, 64 windows of 256 characters).
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import layerwise as lw

ASSETS = Path(os.environ["LAYERWISE_ASSETS"])
MODEL = ASSETS / "models" / "stories-char-940k"
TEXTS: dict[str, Any] = {
    "calibration": str(ASSETS / "text" / "tinystories" / "train_stories.json"),
    "text": str(ASSETS / "text" / "tinystories" / "heldout_stories.json"),
    "text_samples": 64,
    "noise_floor": False,
    "cache": False,
    "layer_windows": 0,
    "format": "dense",
}
ROUNDED: dict[str, Any] = {"method": "gptq", "bits": 4, "group": 32}


def main() -> None:
    """Print a row for each pruner."""
    columns = ("original", "rounded", "pruned", "pruned first", "rounded first")
    print(f"{'pruner':10}" + "".join(f" {name:>13}" for name in columns))
    with tempfile.TemporaryDirectory() as folder:
        rounded = Path(folder) / "rounded"
        original, alone = _made(MODEL, rounded, ROUNDED)
        for pruner in ("magnitude", "wanda", "sparsegpt"):
            pruned = {"pruner": pruner, "density": 0.5}
            place = Path(folder) / pruner
            figures = (
                original,
                alone,
                _made(MODEL, place / "pruned", pruned)[1],
                _made(MODEL, place / "both", pruned | ROUNDED)[1],
                _made(rounded, place / "back", pruned)[1],
            )
            print(f"{pruner:10}" + "".join(f" {figure:13.4f}" for figure in figures), flush=True)


def _made(source: Path, out: Path, wish: dict[str, Any]) -> tuple[float, float]:
    """Perplexity before and after."""
    seen = lw.compress(source, out, **TEXTS, **wish).comparison
    assert seen is not None
    assert seen.perplexity_before is not None
    return seen.perplexity_before, seen.perplexity


if __name__ == "__main__":
    main()
