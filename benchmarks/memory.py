"""What runs were foreseen to take, against what they took: memory and disk, over many sizes.

    LAYERWISE_ASSETS=../shared/assets python benchmarks/memory.py
    LAYERWISE_ASSETS=../shared/assets python benchmarks/memory.py --max-memory 8192

Random Llamas of many sizes, `builtin:tiny` and, where they are, models of the assets; each
`layerwise compress` is a process of its own, with a cache of its own.  The forecast is what the run
said before it started; the peak of memory is the kernel's count when the process has ended, that of
disk the most that the staging folder held.  Words after the command choose among the rows: those
that hold all of them are run.  With `--max-memory` each run is refused a limit of 1 MiB first, and
is then given the one that the refusal names as the smallest.  The table is also written to TABLE,
line by line.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(tempfile.gettempdir()) / "layerwise-memory.md"
ALLOWED = 0.15
# Hidden size, size of the MLP, blocks, vocabulary, dtype.
SIZES = (
    (128, 384, 12, 512, "float32"),
    (256, 704, 4, 4096, "bfloat16"),
    (384, 1024, 8, 32000, "float32"),
    (512, 1536, 6, 32000, "bfloat16"),
    (768, 2048, 4, 8192, "float32"),
    (1024, 2816, 3, 32000, "bfloat16"),
    (1536, 4096, 2, 512, "float32"),
    (1536, 4096, 2, 32000, "bfloat16"),
)
ASSETS = {
    "stories-char-940k": "text/tinystories/train_stories.json",
    "reference-6m": "text/wikitext2/valid.txt",
}
FORMATS = ("dense", "compressed-tensors", "layerwise", "gguf")
GRID = ("--group", "32", "--symmetric")
CALIBRATED = ("--samples", "16", "--length", "128", "--text-samples", "8")
METHODS = {
    "rtn": ("--bits", "4", "--proof", "none"),
    "gptq": ("--bits", "4", "--method", "gptq", *CALIBRATED),
    "sparse": (
        *("--bits", "4", "--method", "gptq", "--density", "0.5", "--pruner", "sparsegpt"),
        *CALIBRATED,
    ),
    "budget": ("--budget", "6bits", "--allow", "bits=4,8", *CALIBRATED),
}


_NOWHERE = subprocess.DEVNULL
_LIMIT = "--max-memory"


@dataclass(frozen=True)
class Row:
    """One run; a model without a path is made."""

    model: str
    path: str
    text: str
    method: str
    format: str

    @property
    def words(self) -> str:
        """What it is chosen by."""
        return f"{self.model} {self.method} {self.format}"


def main() -> None:
    """Print one line per run, and say how far the farthest is off."""
    # This process stays small: the kernel counts what a child inherits as the child's.
    limited = _LIMIT in sys.argv
    words = [word for word in sys.argv[1:] if word != _LIMIT]
    columns = ["memory foreseen, MB", "held, MB", "ratio", "disk foreseen, MB", "held, MB", "ratio"]
    if limited:
        columns = ["held, MB", "smallest limit, MB", "ratio"]
    lines = [
        f"| model | method | format | {' | '.join(columns)} |",
        f"|---|---|---|{'---:|' * len(columns)}",
    ]
    print("\n".join(lines))
    ratios: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in (row for row in _rows() if all(word in row.words for word in words)):
            pairs = (_within if limited else _foreseen)(row, Path(folder))
            figures = (f"{a / 1e6:.4g} | {b / 1e6:.4g} | {a / b:.3f}" for a, b in pairs)
            lines.append(f"| {row.model} | {row.method} | {row.format} | {' | '.join(figures)} |")
            print(lines[-1], flush=True)
            ratios.append(pairs[0][0] / pairs[0][1])
            TABLE.write_text("\n".join(lines) + "\n")
    within = sum(abs(ratio - 1) <= ALLOWED for ratio in ratios)
    print(
        f"\n{within} of {len(ratios)} within {ALLOWED:.0%}; "
        f"ratios from {min(ratios):.3f} to {max(ratios):.3f}"
    )


def _rows() -> Iterator[Row]:
    """Every model with every method, the formats in turn."""
    models = [(_name(size), "", "builtin") for size in SIZES]
    models.append(("builtin:tiny", "builtin:tiny", "builtin"))
    if assets := os.environ.get("LAYERWISE_ASSETS"):
        models += [(n, f"{assets}/models/{n}", f"{assets}/{text}") for n, text in ASSETS.items()]
    for place, (name, path, text) in enumerate(models):
        for turn, method in enumerate(METHODS):
            yield Row(name, path, text, method, FORMATS[(place + turn) % len(FORMATS)])


def _name(size: tuple[int, int, int, int, str]) -> str:
    hidden, _, blocks, vocabulary, dtype = size
    return f"{hidden}x{blocks}, {vocabulary}, {dtype}"


def _foreseen(row: Row, place: Path) -> list[tuple[int, int]]:
    """Bytes of memory foreseen and held, and the same of disk."""
    status, told, held = _run(row, place)
    if status:
        sys.exit(f"{row.words} failed:\n{told}")
    report = json.loads((place / "out" / "report.json").read_text())
    foreseen = report["forecast"]
    return [(foreseen["peak_bytes"], held), (foreseen["disk_bytes"], report["disk_bytes"])]


def _within(row: Row, place: Path) -> list[tuple[int, int]]:
    """Bytes held, and the smallest limit that was said to allow them."""
    _, told, _ = _run(row, place, _LIMIT, "1MiB")
    named = re.search(rf"{_LIMIT} ([0-9.]+)(MiB|GiB) or more", told)
    if not named:
        sys.exit(f"{row.words} was not refused:\n{told}")
    status, told, held = _run(row, place, _LIMIT, named[1] + named[2])
    if status:
        sys.exit(f"{row.words} failed:\n{told}")
    return [(held, int(float(named[1]) * (1 << (20 if named[2] == "MiB" else 30))))]


def _run(row: Row, place: Path, *more: str) -> tuple[int, str, int]:
    """A run's exit status, what it said, and the most memory that the kernel counted."""
    path = row.path or str(place / row.model)
    if not Path(path).exists() and not row.path:
        subprocess.run([sys.executable, __file__, "--make", path], check=True, stderr=_NOWHERE)
    out, cache = place / "out", place / "cache"
    for folder in (out, cache):
        shutil.rmtree(folder, ignore_errors=True)
    calibrated = () if row.method == "rtn" else ("--calibration", row.text)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "layerwise", "compress", path, "-o", str(out)),
            *("--format", row.format, "--device", "cpu", *GRID[2 * (row.format == "gguf") :]),
            *(*METHODS[row.method], *calibrated, *more),
        ],
        env=os.environ | {"LAYERWISE_CACHE": str(cache)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    told = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    return status, told, used.ru_maxrss * 1024


def make(folder: Path) -> None:
    """Write a random Llama, with a tokenizer of the built-in text."""
    import tokenizers
    import torch
    import transformers

    from layerwise import builtin

    hidden, inner, blocks, vocabulary, dtype = next(
        size for size in SIZES if _name(size) == folder.name
    )
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(builtin.text_path("calibration"))], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


if __name__ == "__main__":
    make(Path(sys.argv[2])) if sys.argv[1:2] == ["--make"] else main()
