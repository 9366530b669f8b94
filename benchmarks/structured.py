"""Models that lose units or blocks: how much smaller, how much faster, and how much worse.

    LAYERWISE_ASSETS=../shared/assets OMP_NUM_THREADS=1 python benchmarks/structured.py
    LAYERWISE_ASSETS=../shared/assets python benchmarks/structured.py reference-6m flap

Sizes are those of weight files, times the median of forward passes of transformers through the
files, taken in turn with those of the original; both are printed as shares of the original's.
Words choose among the rows: those that hold all of them are run.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import layerwise as lw

TEXTS = {
    "stories-char-940k": (
        "tinystories/train_stories.json",
        "tinystories/heldout_stories.json",
        0.0,
    ),
    "reference-6m": ("wikitext2/valid.txt", "wikitext2/test.txt", 0.5),
}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "magnitude": {"narrow": "magnitude", "keep": 0.8},
    "wanda": {"narrow": "wanda", "keep": 0.8},
    "flap": {"narrow": "flap", "keep": 0.8},
    "flap own widths": {"narrow": "flap", "keep": 0.8, "widths": "own"},
    "wanda own widths": {"narrow": "wanda", "keep": 0.8, "widths": "own"},
    "a block less by lim": {"drop_blocks": 1, "drop_by": "lim"},
    "a block less by zd": {"drop_blocks": 1, "drop_by": "zd"},
}
WINDOWS, LENGTH = 64, 256
BATCH, PASSES = 8, 15


def main(words: list[str]) -> None:
    """Print one line per row."""
    assets = Path(os.environ["LAYERWISE_ASSETS"])
    print(f"{'':40}{'size':>8}{'time':>8}{'perplexity':>20}{'KL':>9}")
    for model, (calibration, heldout, unseen_from) in TEXTS.items():
        text: Any = assets / "text" / heldout
        if unseen_from:
            content = text.read_text(encoding="utf-8")
            text = [content[int(unseen_from * len(content)) :]]
        for name, way in WAYS.items():
            row = f"{model} {name}"
            if not all(word in row for word in words):
                continue
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                report = lw.compress(
                    assets / "models" / model,
                    out,
                    calibration=assets / "text" / calibration,
                    text=text,
                    samples=WINDOWS,
                    text_samples=WINDOWS,
                    length=LENGTH,
                    noise_floor=False,
                    cache=False,
                    **way,
                )
                faster = _time_ratio(assets / "models" / model, out)
            seen = report.comparison
            assert seen is not None
            assert seen.perplexity_before is not None
            print(
                f"{row:40}{report.bytes_after / report.bytes_before:8.3f}{faster:8.3f}"
                f"{seen.perplexity_before:10.3f} ->{seen.perplexity:7.3f}{seen.kl:9.4f}",
                flush=True,
            )


def _time_ratio(before: Path, after: Path) -> float:
    """What a forward pass takes, as a share of the original's."""
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    models = [transformers.AutoModelForCausalLM.from_pretrained(one) for one in (before, after)]
    spent: list[list[float]] = [[], []]
    with torch.no_grad():
        for _ in range(PASSES):
            for model, times in zip(models, spent, strict=True):
                begun = time.process_time()
                model(ids, use_cache=False)
                times.append(time.process_time() - begun)
    first, second = (statistics.median(times) for times in spent)
    return second / first


if __name__ == "__main__":
    main(sys.argv[1:])
