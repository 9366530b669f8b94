"""Which measure foretells what a layer brings when it alone is changed: docs/measures.md.

    LAYERWISE_ASSETS=../shared/assets OMP_NUM_THREADS=1 python benchmarks/measures.py
    LAYERWISE_ASSETS=../shared/assets python benchmarks/measures.py reference-6m pruned
    python benchmarks/measures.py --page

Every model and treatment is a process of its own.  Those that docs/measures.csv has are not run
again: delete their rows to run them.  Words choose among them: those that hold all of them are
run.  `--page` runs nothing and writes the page from the table.
"""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parent.parent / "docs"
TABLE = DOCS / "measures.csv"
COLUMNS = ("model", "treatment", "measure", "correlation", "layers", "note", "cpu_seconds")
# What is done to each layer alone.
TREATMENTS: Mapping[str, Mapping[str, Any]] = {
    "quantized": {"levels": [3], "method": "rtn", "group": 32},
    "pruned": {"density": 0.5, "pruner": "wanda"},
}
TOLD = {"quantized": "3 bits, rtn, groups of 32", "pruned": "50% kept, wanda"}
WINDOWS = 16
Row = Mapping[str, str]
INTRODUCTION = """# Measures

Written by `python benchmarks/measures.py` from measures.csv. The truth is the KL, in nats per token
of held-out text, that each layer brings to a trained model when it alone is rounded or pruned.
Beside each measure stands the Spearman rank correlation of its scores with that truth over all
layers: 1 ranks them as the truth does, 0 says nothing of it, -1 ranks them the other way round.
What scores whole blocks gives the layers of a block one rank. Options are at their defaults; what
compares a layer with an approximation sees that of the treatment. `layerwise inspect MODEL --truth`
finds the same for another model.
"""


class Model(NamedTuple):
    """Where a model is, what it is calibrated and compared on; the windows' length."""

    path: str
    calibration: str
    heldout: str
    length: int = 256
    unseen_from: float = 0.0


MODELS = {
    "stories-char-940k": Model(
        "models/stories-char-940k",
        "text/tinystories/train_stories.json",
        "text/tinystories/heldout_stories.json",
    ),
    "bytes-wikitext": Model(
        "models/bytes-wikitext", "text/wikitext2/valid.txt", "text/wikitext2/test.txt", 64
    ),
    "reference-6m": Model(
        "models/reference-6m",
        "text/wikitext2/valid.txt",
        "text/wikitext2/test.txt",
        unseen_from=0.5,
    ),
}


def main() -> None:
    """Run what is missing, then write the page."""
    words = [word for word in sys.argv[1:] if word != "--page"]
    if "--page" not in sys.argv:
        _run_missing(words)
    (DOCS / "measures.md").write_text(_page(_rows()))


def _rows() -> list[Row]:
    if not TABLE.exists():
        return []
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def _run_missing(words: Sequence[str]) -> None:
    known = {(row["model"], row["treatment"]) for row in _rows()}
    for model in MODELS:
        for treatment in TREATMENTS:
            key = (model, treatment)
            if key in known or not set(words) <= set(key):
                continue
            done = subprocess.run(
                [sys.executable, __file__, "--one", *key],
                capture_output=True,
                check=False,
                text=True,
            )
            if done.returncode:
                sys.exit(f"{model} {treatment} failed:\n{done.stderr}")
            new = not TABLE.exists()
            with TABLE.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerows(json.loads(done.stdout.splitlines()[-1]))
            print(*key, flush=True)


def one(model: str, treatment: str) -> list[dict[str, Any]]:
    """A row for each measure; the picture of the inspection is written beside the page."""
    import layerwise as lw
    from layerwise.core.telling.inspection import TRUTH
    from layerwise.report import inspection_svg

    assets, facts = Path(os.environ["LAYERWISE_ASSETS"]), MODELS[model]
    content: Any = str(assets / facts.heldout)
    if facts.unseen_from:
        whole = (assets / facts.heldout).read_text(encoding="utf-8")
        content = [whole[int(facts.unseen_from * len(whole)) :]]
    begun = time.process_time()
    found = lw.inspect(
        str(assets / facts.path),
        "all",
        truth=True,
        calibration=str(assets / facts.calibration),
        samples=WINDOWS,
        length=facts.length,
        text=content,
        text_samples=WINDOWS,
        cache=False,
        **TREATMENTS[treatment],
    )
    seconds = round(time.process_time() - begun, 1)
    (DOCS / f"measures-{model}-{treatment}.svg").write_text(inspection_svg(found))
    assert found.truth is not None
    shared = {"model": model, "treatment": treatment, "layers": len(found.truth.kl)}
    rows = [
        {**shared, "measure": name, "correlation": value, "cpu_seconds": seconds}
        for name, value in found.agreement[TRUTH].items()
        if name != TRUTH
    ]
    left_out = found.left_out.items()
    return rows + [{**shared, "measure": name, "note": why} for name, why in left_out]


def _page(rows: Sequence[Row]) -> str:
    lines = [INTRODUCTION]
    for model in MODELS:
        here = [row for row in rows if row["model"] == model]
        if here:
            lines += [f"## {model}", "", *_section(model, here), ""]
    return "\n".join(lines).rstrip() + "\n"


def _section(model: str, rows: Sequence[Row]) -> list[str]:
    """The best measures in words, the table, the pictures, and what was left out."""
    treatments = [name for name in TREATMENTS if any(row["treatment"] == name for row in rows)]
    by_name: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["correlation"]:
            by_name.setdefault(row["measure"], {})[row["treatment"]] = float(row["correlation"])
    lines = [f"{rows[0]['layers']} layers. Best:", ""]
    for treatment in treatments:
        ranked = sorted(by_name, key=lambda name: -by_name[name].get(treatment, -2))
        best = ", ".join(f"{name} ({by_name[name][treatment]:.2f})" for name in ranked[:3])
        seconds = next(r["cpu_seconds"] for r in rows if r["treatment"] == treatment)
        lines.append(f"- {treatment} ({TOLD[treatment]}; {seconds} CPU s): {best}")
    ranked = sorted(by_name, key=lambda name: -max(by_name[name].values()))
    lines += ["", f"| measure | {' | '.join(treatments)} |", f"|---|{'---:|' * len(treatments)}"]
    for name in ranked:
        cells = [f"{v:.2f}" if (v := by_name[name].get(t)) is not None else "-" for t in treatments]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append("")
    for treatment in treatments:
        lines.append(f"![Layers {treatment}](measures-{model}-{treatment}.svg)")
    left_out = {row["measure"]: row["note"] for row in rows if row["note"]}
    told = [f"- {name}: {why}" for name, why in left_out.items()]
    return [*lines, "", "Left out:", "", *told]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(sys.argv[2], sys.argv[3])))
    else:
        main()
