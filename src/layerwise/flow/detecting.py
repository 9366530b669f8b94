"""Texts scored by a model: which of them did a model write?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.reading.checkpoint import Source
from layerwise.core.reading.families import CAUSAL_MODELS
from layerwise.core.reading.labelled import Labels, labelled_texts
from layerwise.core.reading.text import documents, encoder
from layerwise.core.telling.outcome import Detection, TextScore
from layerwise.evaluate.lastde import auroc, fewest, scores
from layerwise.flow.loading import answers

# What the class of texts that a model wrote may be called.
_MACHINE = ("machine", "model", "generated", "ai", "1")
# Tokens that are needed: as many as Lastde++ takes, and the first, which nothing foretells.
_FEWEST = 1 + fewest(4, 15)
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Suspects:
    """Texts to be scored.

    Attributes:
        source: Where they came from.
        texts: Their beginnings.
        ids: The tokens of each.
        labels: Their classes; "" if they have none.
        short: Texts that are too short to be scored.
    """

    source: str
    texts: Sequence[str]
    ids: Sequence[Int64[Tensor, " tokens"]]
    labels: Sequence[str]
    short: int


def suspects(model: Source, given: Labels | Sequence[str], length: int) -> Suspects:
    """Read texts, each as far as `length` tokens: scores of texts of one length can be compared.

    Args:
        model: Its directory holds the tokenizer.
        given: Labelled texts, or a JSON list or text file of texts without labels.
        length: Most tokens of a text.

    Raises:
        UserError: They cannot be read, all are too short, or the model foretells no tokens.
    """
    architecture = (model.config.get("architectures") or [CAUSAL_MODELS[0]])[0]
    if not architecture.endswith(CAUSAL_MODELS):
        raise UserError(
            f"{model.label} is a {architecture}, which foretells no next token.",
            "Detect with a model that does.",
        )
    if length < _FEWEST:
        raise UserError(
            f"texts of {length} tokens are too short to be scored.",
            f"Give --length {_FEWEST} or more.",
        )
    pairs = _read(given)
    encode, _ = encoder(model)
    every = [one[:length] for one in encode([text for text, _ in pairs])]
    kept = [
        (text, torch.tensor(one), label)
        for (text, label), one in zip(pairs, every, strict=True)
        if len(one) >= _FEWEST
    ]
    where = str(given) if isinstance(given, str | Path) else "the texts"
    if not kept:
        raise UserError(
            f"{where}: no text has {_FEWEST} tokens, which a score takes.", "Give longer texts."
        )
    texts, ids, labels = zip(*kept, strict=True)
    return Suspects(where, [text[:_SHOWN] for text in texts], ids, labels, len(every) - len(kept))


def _read(given: Labels | Sequence[str]) -> list[tuple[str, str]]:
    if isinstance(given, str | Path):
        path = Path(given).expanduser()
        if path.is_dir() or path.suffix in (".tsv", ".csv", ".jsonl"):
            return labelled_texts(path)
        return [(text, "") for text in documents(given)]
    return [(one, "") if isinstance(one, str) else (one[0], str(one[1])) for one in given]


def detected(model: Any, found: Suspects) -> Detection:
    """Score texts by a loaded model; of two classes, say how well each score tells them apart."""
    seen: list[TextScore] = []
    for text, ids, label in zip(found.texts, found.ids, found.labels, strict=True):
        (logits,) = answers(model, ids[None])
        told = logits[0, :-1].float().log_softmax(dim=-1)
        seen.append(TextScore(text, len(ids) - 1, label, scores(told, ids[1:])))
    classes = sorted(set(found.labels))
    areas: dict[str, float] = {}
    machine = ""
    if len(classes) == 2:
        named = [one for one in classes if one.lower() in _MACHINE]
        machine = named[0] if named else classes[-1]
        own = torch.tensor([label == machine for label in found.labels])
        for name in seen[0].scores:
            areas[name] = auroc(torch.tensor([one.scores[name] for one in seen]), own)
    return Detection(found.source, seen, machine, areas, found.short)
