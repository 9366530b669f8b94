"""Texts of known classes, for probes of what a model knows of them."""

import csv
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.reading.checkpoint import Source
from layerwise.core.reading.families import CAUSAL_MODELS, POSITIONS, configured
from layerwise.core.reading.text import encoder
from layerwise.core.written import parse_json

Labels = str | Path | Sequence[tuple[str, Any]]

# Fewer than this tell a probe that has learned something from one that has not by luck alone.
FEWEST = 20
_TEXTS = ("text", "sentence", "question", "prompt", "statement")
_FORMATS = (
    "Give lines of `text<TAB>label`, JSON lines with `text` and `label`, a directory that has one "
    "of them as train.tsv or train.jsonl, or one with a folder of .txt files for each class."
)


@dataclass(frozen=True, slots=True)
class Labelled:
    """Texts of known classes as tokens.

    Attributes:
        ids: Token ids, (examples, length), filled up on the right.
        last: Where the last token of each text stands, (examples,).
        labels: The class of each, (examples,).
        classes: What classes are called.
        label: Where the texts came from, for reports.
    """

    ids: Int[Tensor, "examples length"]
    last: Int[Tensor, " examples"]
    labels: Int[Tensor, " examples"]
    classes: tuple[str, ...]
    label: str


def labelled(source: Source, given: Labels, *, examples: int, length: int) -> Labelled:
    """Read some texts of known classes, no text twice, drawn from all that there are.

    Of a text that is longer, the first `length` tokens are read.

    Args:
        source: The model; its directory holds the tokenizer.
        given: A file, a directory, or pairs of a text and its class.
        examples: Texts wanted; where there are more, so many are drawn, always the same.
        length: Most tokens of a text.

    Raises:
        UserError: They cannot be read, are too few for a probe, or the model reads tokens that
            come later.
    """
    architecture = (source.config.get("architectures") or [CAUSAL_MODELS[0]])[0]
    if not architecture.endswith(CAUSAL_MODELS):
        raise UserError(
            f"{source.label} is a {architecture}, in which a text's last token sees what fills "
            "the window up behind it.",
            "Probe a model that foretells the next token.",
        )
    positions = configured(source.config, POSITIONS)
    if length < 1 or (positions and length > positions):
        raise UserError(
            f"texts of {length} tokens are asked for, and {source.label} reads from 1 to "
            f"{positions}.",
            "Give another --length.",
        )
    label = str(given) if isinstance(given, str | Path) else "pairs"
    found: dict[str, str] = dict(_pairs(given))
    rows: list[tuple[str, str]] = sorted(found.items())
    random.Random(0).shuffle(rows)
    encode, _ = encoder(source)
    rows = rows[:examples]
    tokens = [one[:length] for one in encode([text for text, _ in rows])]
    kept = [(one, name) for one, (_, name) in zip(tokens, rows, strict=True) if one]
    classes = tuple(sorted({name for _, name in kept}))
    labels = torch.tensor([classes.index(name) for _, name in kept], dtype=torch.long)
    check_labels(labels, classes, label)
    widest = max(len(one) for one, _ in kept)
    ids = torch.zeros(len(kept), widest, dtype=torch.long)
    for row, (one, _) in zip(ids, kept, strict=True):
        row[: len(one)] = torch.tensor(one)
    last = torch.tensor([len(one) - 1 for one, _ in kept])
    return Labelled(ids, last, labels, classes, label)


def check_labels(
    labels: Int[Tensor, " examples"], classes: Sequence[str] = (), where: str = "the labels"
) -> None:
    """Refuse labels that no probe can learn.

    Args:
        labels: The class of each text, from 0.
        classes: What classes are called.
        where: Where they came from.

    Raises:
        UserError: There are fewer than two classes, fewer than two texts of one, or few texts.
    """
    seen: list[int] = labels.tolist()
    counts = Counter(seen)
    names = {one: classes[one] if classes else str(one) for one in counts}
    rare = [names[one] for one, count in counts.items() if count < 2]
    told = f"{where}: {len(labels)} texts of {len(counts)} classes"
    if len(counts) < 2:
        raise UserError(f"{told}, and a probe tells classes apart.", "Give two classes or more.")
    if len(labels) < FEWEST:
        raise UserError(
            f"{told}, too few for a probe.", f"Give {FEWEST} or more, with no text twice."
        )
    if rare:
        raise UserError(
            f"{told}; of {', '.join(sorted(rare)[:3])} there is one text alone, which cannot be "
            "both learned from and judged by.",
            "Read more texts (--label-examples), or leave such classes out.",
        )


def labelled_texts(given: Labels) -> list[tuple[str, str]]:
    """Texts with their classes, as they lie in a file or directory.

    Raises:
        UserError: They cannot be read.
    """
    return list(_pairs(given))


def _pairs(given: Labels) -> Iterator[tuple[str, str]]:
    if not isinstance(given, str | Path):
        for text, name in given:
            yield text, str(name)
        return
    path = Path(given).expanduser()
    if path.is_dir():
        yield from _of_directory(path)
        return
    if not path.exists():
        raise UserError(f"there is no file {path} of labelled texts.", _FORMATS)
    try:
        content = path.read_text(encoding="utf-8")
        rows = _rows(path, content)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}", _FORMATS) from error
    if not rows:
        raise UserError(f"{path} holds no text with a label.", _FORMATS)
    yield from rows


def _of_directory(path: Path) -> Iterator[tuple[str, str]]:
    for name in ("train.tsv", "train.csv", "train.jsonl"):
        if (path / name).exists():
            yield from _pairs(path / name)
            return
    files = sorted(path.glob("*/*.txt"))
    if not files:
        raise UserError(f"{path} holds no labelled texts.", _FORMATS)
    for file in files:
        yield file.read_text(encoding="utf-8"), file.parent.name


def _rows(path: Path, content: str) -> list[tuple[str, str]]:
    if path.suffix in (".jsonl", ".json"):
        objects: list[Mapping[str, Any]] = (
            parse_json(content)
            if path.suffix == ".json"
            else [parse_json(line) for line in content.splitlines() if line.strip()]
        )
        return [_of_object(one) for one in objects]
    separator = "," if path.suffix == ".csv" else "\t"
    quoting = csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE
    table = [
        row
        for row in csv.reader(content.splitlines(), delimiter=separator, quoting=quoting)
        if len(row) > 1
    ]
    text, name = 0, 1
    if table and "label" in table[0]:
        header, *table = table
        name = header.index("label")
        text = next((header.index(one) for one in _TEXTS if one in header), 1 - min(name, 1))
    return [(row[text].strip(), row[name].strip()) for row in table]


def _of_object(one: Any) -> tuple[str, str]:
    named = [key for key in _TEXTS if isinstance(one, Mapping) and key in one]
    if not named or "label" not in one:
        raise ValueError(f"{str(one)[:80]!r} has no text and label")
    return str(one[named[0]]), str(one["label"])
