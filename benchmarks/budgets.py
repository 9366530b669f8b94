"""KL against size: uniform rounding, uniform GPTQ, widths by knapsack, and the joint budget.

    LAYERWISE_ASSETS=../shared/assets python benchmarks/budgets.py

On the assets' stories-char-940k and reference-6m, groups of 32 with zero points, in the format
`layerwise`; bits are stored bits, scales and zero points and masks and factors counted.  A uniform
row is the widest that the budget pays for.  The joint budget may choose widths, densities
(SparseGPT) and ranks (EoRA); every level of it is made once, in the first run, and the last line
tells what another budget took after that.
"""

import os
import tempfile
import time
from pathlib import Path

import layerwise as lw
from layerwise.core.progress import Silent
from layerwise.core.telling.outcome import SweepPoint

ASSETS = Path(os.environ["LAYERWISE_ASSETS"])
BUDGETS = (2.0, 2.5, 3.0, 4.0)
WIDTHS = [1, 2, 3, 4, 8]
TEXTS = {
    "stories-char-940k": {
        "calibration": ASSETS / "text/tinystories/train_stories.json",
        "text": ASSETS / "text/tinystories/heldout_stories.json",
    },
    "reference-6m": {
        "calibration": ASSETS / "text/wikitext2/valid.txt",
        "text": ASSETS / "text/wikitext2/test.txt",
    },
}
SHARED = {"samples": 64, "text_samples": 64, "length": 256, "group": 32, "format": "layerwise"}
JOINT = {
    "allow": {"bits": WIDTHS, "density": [1.0, 0.75, 0.5], "rank": [0, 4, 16]},
    "pruner": "sparsegpt",
    "compensator": "eora",
}


def main() -> None:
    """Print a table per model."""
    for name, texts in TEXTS.items():
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LAYERWISE_CACHE"] = f"{folder}/cache"
            _table(name, Path(folder), {**texts, **SHARED})


def _table(name: str, folder: Path, wish: dict[str, object]) -> None:
    model, asked = ASSETS / "models" / name, [f"{bits}bits" for bits in BUDGETS]
    how = {"methods": ["rtn", "gptq"], "budgets": asked, "uniform": True}
    widths = lw.sweep(model, folder / "widths", **how, allow={"bits": WIDTHS}, **wish)
    begun = time.perf_counter()
    how = {"methods": ["gptq"], "budgets": asked}
    joint = lw.sweep(model, folder / "joint", **how, **JOINT, **wish)
    made = time.perf_counter() - begun
    print(f"\n{name}: the joint sweep took {made:.0f} s, all its levels included")
    print(f"{'budget':10}{'plan':22}{'stored bits':>12}{'KL':>10}{'perplexity':>12}{'top-1':>9}")
    for bits, budget in zip(BUDGETS, asked, strict=True):
        for method in ("rtn", "gptq"):
            even = [p for p in widths.points if p.uniform and p.method == method and p.bits <= bits]
            _row(budget, f"uniform {method}", max(even, key=lambda one: one.bits))
        for method in ("rtn", "gptq"):
            _row(budget, f"widths, {method}", _at(widths.points, method, budget))
        _row(budget, "joint, gptq", _at(joint.points, "gptq", budget))
    begun = time.perf_counter()
    plan = lw.plan(model, budget="3.3bits", method="gptq", **JOINT, **wish, progress=Silent())
    solved = time.perf_counter() - begun
    begun = time.perf_counter()
    texts = {key: wish[key] for key in ("calibration", "samples", "length")}
    lw.compress(model, folder / "again", plan=plan, **texts, proof="none")
    print(
        f"another budget: re-solved in {solved:.1f} s, stitched and written in "
        f"{time.perf_counter() - begun:.1f} s",
        flush=True,
    )


def _at(points: object, method: str, budget: str) -> SweepPoint:
    return next(p for p in points if (p.method, p.budget, p.uniform) == (method, budget, False))


def _row(budget: str, plan: str, point: SweepPoint) -> None:
    print(
        f"{budget:10}{plan:22}{point.bits:12.3f}{point.kl:10.4f}{point.perplexity:12.4f}"
        f"{point.top1:9.2%}",
        flush=True,
    )


if __name__ == "__main__":
    main()
