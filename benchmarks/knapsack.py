"""A knapsack plan against uniform mixes of 3 and 4 bits of the same size, by KL.

    LAYERWISE_ASSETS=../shared/assets python benchmarks/knapsack.py

On the assets' stories-char-940k, GPTQ in symmetric groups of 32.  The mixes give 4 bits to every
other item (fused layers are one), starting with the first or with the second.
"""

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import layerwise as lw
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.telling.outcome import Report

ASSETS = Path(os.environ["LAYERWISE_ASSETS"])
MODEL = ASSETS / "models/stories-char-940k"
TEXTS = {
    "calibration": ASSETS / "text/tinystories/train_stories.json",
    "text": ASSETS / "text/tinystories/heldout_stories.json",
    "samples": 64,
    "text_samples": 128,
    "length": 256,
}
GRID = {"method": "gptq", "group": 32, "symmetric": True}


def main() -> None:
    """Print one line per plan."""
    even = LayerPlan(bits=3, group=32, symmetric=True, method="gptq")
    found = lw.open(MODEL).structure
    items = found.items()
    print(f"{'plan':34}{'stored bits':>12}{'KL':>10}{'perplexity':>12}")
    for name, first in (("3 and 4 bits in turn", 0), ("4 and 3 bits in turn", 1)):
        widths = {
            layer.name: 4 if number % 2 == first else 3
            for number, item in enumerate(items)
            for layer in item
        }
        plan = Plan({layer: replace(even, bits=widths[layer]) for layer in found.layers})
        mixed = _run(name, plan=plan)
        _run(f"knapsack at {mixed.average_bits:.3f} bits", budget=f"{mixed.average_bits}bits")
    _run("3 bits everywhere", plan=Plan(dict.fromkeys(found.layers, even)))
    _run("knapsack at 3.5 bits", budget="3.5bits")


def _run(name: str, **wish: object) -> Report:
    grid = {} if "plan" in wish else GRID
    with tempfile.TemporaryDirectory() as folder:
        report = lw.compress(MODEL, Path(folder) / "out", **TEXTS, **grid, **wish)
    seen = report.comparison
    assert seen is not None
    print(f"{name:34}{report.average_bits:12.3f}{seen.kl:10.4f}{seen.perplexity:12.4f}", flush=True)
    return report


if __name__ == "__main__":
    main()
