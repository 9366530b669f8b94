"""All quantizers at 2, 3 and 4 bits, in files of equal size, on trained models: docs/quantizers.md.

    LAYERWISE_ASSETS=../shared/assets OMP_NUM_THREADS=1 python benchmarks/quantizers.py
    LAYERWISE_ASSETS=../shared/assets python benchmarks/quantizers.py stories-char-940k auto
    python benchmarks/quantizers.py --page

Every row is a process of its own, with no cache.  Rows that docs/quantizers.csv has are not run
again: delete those that are to be.  Words choose among the rows: those that hold all of them are
run.  `--page` runs nothing and writes the page and its pictures from the table.

The size to keep to is that of rounding in symmetric groups of 32; a method that stores more beside
its codes gets the smallest groups with which its files are no larger, or narrower codes if none
are.
"""

import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
TABLE = DOCS / "quantizers.csv"
BITS = (4, 3, 2)
GROUPS = (32, 64, 128, 0)
# Padding of words and headers that name more tensors may make files so much larger, of equal codes.
SLACK = 1.01
CLASSIFIER = "cifar10-resnet20"
# Path, calibration text, held-out text below the assets; what part of the latter no one trained on.
TEXTS = {
    "stories-char-940k": (
        "models/stories-char-940k",
        "text/tinystories/train_stories.json",
        "text/tinystories/heldout_stories.json",
        0.0,
    ),
    "reference-6m": (
        "models/reference-6m",
        "text/wikitext2/valid.txt",
        "text/wikitext2/test.txt",
        0.5,
    ),
}
WINDOWS, LENGTH = 64, 256
CALIBRATION_IMAGES, TEST_IMAGES = 256, 4000
# Inputs of a convolution are no multiple of 32: one grid a row there.
CLASSIFIER_GROUPS = (0,)
COLUMNS = (
    "model",
    "method",
    "bits",
    "width",
    "group",
    "inputs",
    "stored_bits",
    "bytes",
    "kl",
    "quality",
    "cpu_seconds",
    "peak_bytes",
    "note",
)
Row = Mapping[str, str]
INTRODUCTION = f"""# Quantizers

Written by `python benchmarks/quantizers.py` from quantizers.csv, best first. All layers of a model
get the same width; every file is no larger than that of rounding to nearest in symmetric groups of
32 (ResNet-20: one grid for each output), to {SLACK - 1:.0%}: what is kept beside the codes is paid
for with larger groups, or with narrower codes. KL is the divergence of the compressed model from
the original, in nats per token (per image), on held-out data that neither training nor calibration
saw. CPU seconds are those of the whole run, the comparison included (not that of images), on one
thread; the peak of memory is the kernel's count for its process, of which Python and torch take
330 MB. Options are at their defaults.
"""


def main() -> None:
    """Run what is missing, then write the page."""
    words = [word for word in sys.argv[1:] if word != "--page"]
    if "--page" not in sys.argv:
        _run_missing(words)
    _write_page(_rows())


def _rows() -> list[Row]:
    if not TABLE.exists():
        return []
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def _run_missing(words: Sequence[str]) -> None:
    from layerwise.core import catalogue

    known = {(row["model"], row["method"], row["bits"]) for row in _rows()}
    for model in (*TEXTS, CLASSIFIER):
        for bits in BITS:
            for method in catalogue.methods("quantize"):
                key = (model, method.name, str(bits))
                if key in known or bits not in method.widths or not set(words) <= set(key):
                    continue
                row = _measured(*key)
                new = not TABLE.exists()
                with TABLE.open("a", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
                    if new:
                        writer.writeheader()
                    writer.writerow(row)
                print({name: value for name, value in row.items() if value != ""}, flush=True)


def _measured(model: str, method: str, bits: str) -> dict[str, Any]:
    """One row, from a process of its own, and the most memory that the kernel counted for it."""
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(
            [sys.executable, __file__, "--one", model, method, bits],
            stdout=subprocess.PIPE,
            stderr=told,
            text=True,
        )
        assert process.stdout is not None
        answer = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        told.seek(0)
        if status:
            sys.exit(f"{model} {method} {bits} failed:\n{told.read()}")
    found = {"peak_bytes": used.ru_maxrss * 1024, **json.loads(answer.splitlines()[-1])}
    return {"model": model, "method": method, "bits": bits, **found}


def one(model: str, method: str, bits: int) -> dict[str, Any]:
    """What a method makes of a model: its figures, or why it refused."""
    import layerwise as lw
    from layerwise.core.errors import UserError

    images = model == CLASSIFIER
    source, calibration, text = _classifier() if images else _texts(model)
    how: dict[str, Any] = {"calibration": calibration, "samples": WINDOWS, "length": LENGTH}
    if images:
        how["samples"] = CALIBRATION_IMAGES
    try:
        groups = CLASSIFIER_GROUPS if images else GROUPS
        wish, size = _fitting(source, method, bits, how, groups)
        with tempfile.TemporaryDirectory() as folder:
            report = lw.compress(
                source,
                Path(folder) / "out",
                **how,
                **wish,
                text=text,
                text_samples=TEST_IMAGES if images else WINDOWS,
                noise_floor=False,
                cache=False,
                proof="none" if images else "auto",
                layer_windows=0,
            )
            seen = report.comparison
            if images:
                kl, quality = _judged(source, Path(folder) / "out")
            else:
                assert seen is not None
                kl, quality = seen.kl, seen.perplexity
    except UserError as error:
        return {"note": str(error).replace("\n", " ")}
    return {
        "width": wish["bits"],
        "group": wish["group"],
        "inputs": wish.get("activation", ""),
        "stored_bits": round(report.average_bits, 4),
        "bytes": size,
        "kl": kl,
        "quality": quality,
        "cpu_seconds": round(report.cpu_seconds, 1),
    }


def _fitting(
    source: Any, method: str, bits: int, how: Mapping[str, Any], groups: Sequence[int]
) -> tuple[dict[str, Any], int]:
    """The options with which a method's files are no larger than those of rounding; their bytes."""
    import layerwise as lw
    from layerwise.core import catalogue
    from layerwise.core.errors import UserError

    def files(wish: Mapping[str, Any]) -> int:
        plan = lw.plan(source, **how, **wish, cache=False)
        return lw.forecast(source, plan, **how, proof="none").size_bytes

    shared = {"bits": bits, "symmetric": True, "format": "layerwise"}
    room = SLACK * files({**shared, "method": "rtn", "group": groups[0]})
    refusal = UserError(
        f"{method} stores more at {bits} bits than rounding does in groups of {groups[0]} "
        "(0: a row), whatever its own groups.",
        "Compare it at another width.",
    )
    widths = [width for width in catalogue.get(f"quantize/{method}").widths if width <= bits]
    for width, group in itertools.product(reversed(widths), groups):
        wish = {**shared, "bits": width, "method": method, "group": group}
        try:
            size = files(wish)
        except UserError as error:  # groups must divide a layer's width
            refusal = error
            continue
        if size <= room:
            activates = catalogue.get(f"quantize/{method}").activates
            return wish | ({"activation": activates} if activates else {}), size
    raise refusal


def _texts(model: str) -> tuple[str, str, Any]:
    assets = Path(os.environ["LAYERWISE_ASSETS"])
    path, calibration, heldout, unseen_from = TEXTS[model]
    text: Any = str(assets / heldout)
    if unseen_from:
        content = (assets / heldout).read_text(encoding="utf-8")
        text = [content[int(unseen_from * len(content)) :]]
    return str(assets / path), str(assets / calibration), text


def _classifier() -> tuple[Any, Any, Any]:
    """ResNet-20, and the images it is calibrated on."""
    assets = Path(os.environ["LAYERWISE_ASSETS"])
    folder = assets / "models" / "cifar10-resnet"
    sys.path.insert(0, str(folder))
    import cifar_resnet

    model = cifar_resnet.load(20, str(folder / "resnet20.safetensors")).eval()
    return model, _images("train_10k", CALIBRATION_IMAGES)[0], None


def _images(name: str, count: int) -> tuple[Any, Any]:
    """Normalised images and their labels."""
    import numpy as np
    import torch

    with np.load(Path(os.environ["LAYERWISE_ASSETS"]) / "cifar10" / f"{name}.npz") as file:
        pixels, labels = torch.tensor(file["x"][:count]), torch.tensor(file["y"][:count])
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    return (pixels.permute(0, 3, 1, 2) / 255 - mean) / std, labels


def _judged(model: Any, out: Path) -> tuple[float, float]:
    """KL divergence from the original, nats per image, and accuracy."""
    import torch

    import layerwise as lw

    images, labels = _images("test_10k", TEST_IMAGES)
    made = lw.load(out, into=model)
    with torch.no_grad():
        before, after = (
            torch.cat([net(part) for part in images.split(500)]).log_softmax(dim=1).double()
            for net in (model, made)
        )
    lost = (before.exp() * (before - after)).sum(dim=1).mean()
    return float(lost), float((after.argmax(dim=1) == labels).float().mean())


def _write_page(rows: Sequence[Row]) -> None:
    """The page, and a picture for each model."""
    from layerwise.core.telling.outcome import Sweep
    from layerwise.report.plots import pareto_svg

    lines = [INTRODUCTION]
    for model in (*TEXTS, CLASSIFIER):
        here = [row for row in rows if row["model"] == model]
        measured = sorted((row for row in here if row["kl"]), key=lambda row: float(row["kl"]))
        if not measured:
            continue
        picture = f"quantizers-{model}.svg"
        points = [_point(row, measured) for row in measured]
        (DOCS / picture).write_text(pareto_svg(Sweep(model, "held-out", points)))
        lines += [f"## {model}", "", f"![Size against KL divergence]({picture})", ""]
        for bits in BITS:
            at = [row for row in measured if row["bits"] == str(bits)]
            refused = [row for row in here if row["bits"] == str(bits) and row["note"]]
            if not at and not refused:
                continue
            lines += [f"### {bits} bits", "", *_table(at, model == CLASSIFIER), ""]
            lines += [f"- {row['method']}: {row['note']}" for row in refused]
            lines += [""] * bool(refused)
    (DOCS / "quantizers.md").write_text("\n".join(lines).rstrip() + "\n")


def _point(row: Row, among: Sequence[Row]) -> Any:
    from layerwise.core.telling.outcome import SweepPoint

    size, kl = int(row["bytes"]), float(row["kl"])
    front = not any(int(other["bytes"]) <= size and float(other["kl"]) < kl for other in among)
    return SweepPoint(
        method=row["method"],
        budget=f"{row['bits']} bits",
        bits=float(row["stored_bits"]),
        bytes=size,
        kl=kl,
        perplexity=None,
        top1=None,
        seconds=float(row["cpu_seconds"]),
        front=front,
        out="",
    )


def _table(rows: Iterable[Row], images: bool) -> list[str]:
    quality = "accuracy" if images else "perplexity"
    made = [
        f"| method | KL, nats | {quality} | codes, bits | stored bits | group | inputs | CPU s "
        "| peak, MB |",
        "|---|---:|---:|---:|---:|---:|---|---:|---:|",
    ]
    for row in rows:
        judged = f"{float(row['quality']):.2%}" if images else f"{float(row['quality']):.4f}"
        figures = (
            row["method"],
            f"{float(row['kl']):.4f}",
            judged,
            row["width"],
            f"{float(row['stored_bits']):.3f}",
            row["group"] if row["group"] != "0" else "row",
            row["inputs"] or "-",
            row["cpu_seconds"],
            f"{int(row['peak_bytes']) / 1e6:.0f}",
        )
        made.append(f"| {' | '.join(figures)} |")
    return made


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
    else:
        main()
