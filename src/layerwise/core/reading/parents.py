"""The models of a merge: checked against each other, and put in an order of their own.

Sums of floats depend on their order.  So models are ordered by their content, whatever order they
were given in; equal models with equal settings then give equal bytes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.packing import raw_bytes
from layerwise.core.reading.assembled import Assembled, Piece
from layerwise.core.reading.checkpoint import Source, TensorInfo
from layerwise.core.reading.entries import Reader
from layerwise.core.reading.families import HEADS
from layerwise.core.reading.structure import embeds
from layerwise.core.written import parse_json

# What becomes of a tensor that some of the models lack.
Missing = Literal["refuse", "keep", "base"]

TOKENIZER = "tokenizer.json"
# Entries read from each end of a tensor to tell models apart.
_SAMPLE = 512
# What a configuration says of how it was saved, and not of the model.
_COSMETIC = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "_commit_hash"}
)


@dataclass(frozen=True)
class Parents:
    """The models of a merge, in their own order.

    Attributes:
        models: The models.
        given: For each of them, where it stood among those that were given.
        base: Their common ancestor, if there is one.
        tensors: Every tensor of the result, as the models store it.
        absent: By tensor, the models that lack it.
        digests: A digest of each model's content.
        notes: What the reader of a report should know.
        described: The model whose configuration, tokenizer and other files the result gets.
    """

    models: Sequence[Source]
    given: Sequence[int]
    base: Source | None
    tensors: Mapping[str, TensorInfo]
    absent: Mapping[str, Sequence[Source]]
    digests: Sequence[str]
    notes: Sequence[str]
    described: Source

    def of(self, name: str) -> list[int]:
        """Which models have a tensor."""
        lacking = self.absent.get(name, ())
        return [place for place, one in enumerate(self.models) if one not in lacking]

    def ordered(self, given: Sequence[Any]) -> list[Any]:
        """Something of each model, as they were given, in the order of `models`."""
        return [given[place] for place in self.given]


def parents(
    models: Sequence[Source],
    base: Source | None,
    *,
    missing: Missing = "refuse",
    align: bool = False,
    beside: Sequence[Any] = (),
) -> Parents:
    """Check that models can be merged, and order them.

    Args:
        models: At least one.
        base: Their common ancestor.
        missing: What becomes of a tensor that a model or the base lacks: refuse it; keep it, made
            of those that have it; or give those that lack it the base's.
        align: Match the rows of embeddings and heads by what their tokens are.
        beside: What each model is merged with, which orders those of equal content.

    Raises:
        UserError: They are of different kinds, shapes or vocabularies, or a tensor is missing.
    """
    if not models:
        raise UserError("there is no model to merge.", "Give one or more.")
    everyone = [*models, *([base] if base else [])]
    _check_kinds(everyone)
    said = _differing_settings(everyone)
    everyone, told = _untied(everyone)
    said += told
    reference = len(models) if base else 0
    everyone, aligned = _aligned(everyone, reference, align)
    said += aligned
    models, base = everyone[: len(models)], everyone[-1] if base else None
    tensors, absent, told = _common(models, base, missing)
    said += told
    with_keys = _digests(models)
    extra = list(beside) or [""] * len(models)
    order = sorted(range(len(models)), key=lambda k: (with_keys[k], json.dumps(extra[k])))
    found = Parents(
        [models[k] for k in order],
        order,
        base,
        tensors,
        absent,
        [with_keys[k] for k in order],
        said,
        everyone[reference] if base or aligned else models[order[0]],
    )
    if base is None and len(set(with_keys)) > 1:
        return replace(found, notes=[*said, *_first_told(found)])
    return found


def _first_told(found: Parents) -> list[str]:
    files = {tuple(file.name for file in one.companions) for one in found.models}
    if len(files) == 1 and not any("differ" in note for note in found.notes):
        return []
    return [f"configuration and tokenizer are those of {found.described.label}"]


def _check_kinds(everyone: Sequence[Source]) -> None:
    for one in everyone:
        if one.config.get("quantization_config"):
            raise UserError(
                f"{one.label} is quantized (its config.json has a quantization_config).",
                "Give the original checkpoint it was made from.",
            )
        if not one.tensors:
            raise UserError(f"{one.label} has no tensors.", "Give a model in safetensors.")
    kinds = {str(one.config.get("model_type", "")): one for one in everyone}
    if len(kinds) > 1:
        (kind, first), (other, second) = list(kinds.items())[:2]
        raise UserError(
            f"{first.label} is a {kind or 'model without a config.json'}, {second.label} a "
            f"{other or 'model without a config.json'}.",
            "Only models of one architecture can be merged.",
        )


def _differing_settings(everyone: Sequence[Source]) -> list[str]:
    names = sorted({name for one in everyone for name in one.config} - _COSMETIC)
    differing = [
        name
        for name in names
        if len({json.dumps(one.config.get(name), default=str) for one in everyone}) > 1
    ]
    return (
        [f"config.json differs between the models in {', '.join(differing)}"] if differing else []
    )


def _untied(everyone: Sequence[Source]) -> tuple[list[Source], list[str]]:
    """The same models without heads that are stored a second time beside a tied embedding."""
    made: list[Source] = []
    told: list[str] = []
    everywhere = {name for one in everyone for name in one.tensors}
    shared = {name for name in everywhere if all(name in one.tensors for one in everyone)}
    for one in everyone:
        twice = [
            name
            for name in one.tensors
            if name not in shared
            and _module(name) in HEADS
            and one.config.get("tie_word_embeddings")
        ]
        twin = next((name for name in one.tensors if embeds(_module(name))), "")
        if twice and twin and all(_equal(one, name, twin) for name in twice):
            told.append(f"{', '.join(twice)} of {one.label} is its tied embedding, stored twice")
            kept = {name: Piece(one, name) for name in one.tensors if name not in twice}
            made.append(Assembled(one.label, kept, one.config, one.companions))
        else:
            made.append(one)
    return made, told


def _module(tensor: str) -> str:
    """The last word of the module that holds a tensor."""
    return tensor.removesuffix(".weight").rpartition(".")[2]


def _of_tokens(source: Source, info: TensorInfo) -> bool:
    """Whether a tensor has a row for each token."""
    word = _module(info.name)
    named = word in HEADS or word == "wte" or embeds(word)
    return named and info.shape[:1] == (source.config.get("vocab_size"),)


def _equal(source: Source, one: str, other: str) -> bool:
    if source.tensors[one].shape != source.tensors[other].shape:
        return False
    rows = max(1, (1 << 22) // max(1, source.tensors[one].shape[-1]))
    return all(
        torch.equal(source.read(one, at, at + rows), source.read(other, at, at + rows))
        for at in range(0, source.tensors[one].shape[0], rows)
    )


def _aligned(
    everyone: Sequence[Source], reference: int, align: bool
) -> tuple[list[Source], list[str]]:
    """The models with their rows of embeddings and heads in the order of one vocabulary."""
    vocabularies = [_vocabulary(one) for one in everyone]
    wanted, holder = vocabularies[reference], everyone[reference]
    if all(one is None or wanted is None or one == wanted for one in vocabularies):
        return list(everyone), []
    other = next(n for n, one in enumerate(vocabularies) if one is not None and one != wanted)
    if not align:
        raise UserError(
            f"{holder.label} and {everyone[other].label} have different tokenizers: "
            f"{_difference(wanted or {}, vocabularies[other] or {})}.",
            "Rows of their embeddings stand for different tokens.  Match them by token with "
            "--align; the result then has the tokenizer of the base, or of the first model given.",
        )
    told: list[str] = []
    made: list[Source] = []
    assert wanted is not None
    for one, vocabulary in zip(everyone, vocabularies, strict=True):
        if one is holder or vocabulary is None or vocabulary == wanted:
            made.append(one)
            continue
        pieces = {name: Piece(one, name) for name in one.tensors}
        count = 0
        for name, info in one.tensors.items():
            if _of_tokens(one, info) and name in holder.tensors:
                rows = _rows(wanted, vocabulary, holder.tensors[name].shape[0], info.shape[0])
                pieces[name] = Piece(one, name, rows, Piece(holder, name))
                count = int((rows >= 0).sum())
        told.append(
            f"{count} of the {len(wanted)} tokens of {holder.label} are in {one.label}, whose rows "
            "were matched by token; for the others it took that model's rows"
        )
        made.append(Assembled(one.label, pieces, one.config, one.companions))
    return made, told


def _rows(wanted: Mapping[str, int], there: Mapping[str, int], count: int, limit: int) -> Tensor:
    """For each row of one vocabulary the row of another with the same token, -1 for none."""
    rows = torch.full((count,), -1, dtype=torch.long)
    for token, place in wanted.items():
        if place < count and there.get(token, limit) < limit:
            rows[place] = there[token]
    return rows


def _vocabulary(source: Source) -> dict[str, int] | None:
    """Each token's row, by the token; None where no tokenizer says."""
    file = next((one for one in source.companions if one.name == TOKENIZER), None)
    if file is None:
        return None
    try:
        content: Any = parse_json(file.read_text(encoding="utf-8"))
        entries: Any = content["model"]["vocab"]
        added = {one["content"]: int(one["id"]) for one in content.get("added_tokens") or []}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read: {error!r}", "Download it again.") from error
    if isinstance(entries, list):  # of a unigram model: pairs of token and score
        entries = {str(token): place for place, (token, _) in enumerate(entries)}
    return {**entries, **added}


def _difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    missing = len(ours.keys() ^ theirs.keys())
    moved = sum(1 for token, place in ours.items() if theirs.get(token, place) != place)
    return f"{missing} tokens are in one only, {moved} stand for other rows"


def _common(
    models: Sequence[Source], base: Source | None, missing: Missing
) -> tuple[dict[str, TensorInfo], dict[str, list[Source]], list[str]]:
    everyone = [*models, *([base] if base else [])]
    tensors: dict[str, TensorInfo] = {}
    for one in [everyone[-1], *everyone] if base else everyone:
        for name, info in one.tensors.items():
            known = tensors.get(name)
            tensors[name] = info if known is None else _agreed(known, info, everyone, name)
    absent = {
        name: lacking
        for name in tensors
        if (lacking := [one for one in everyone if name not in one.tensors])
    }
    if absent and missing == "refuse":
        name, lacking = next(iter(absent.items()))
        has = next(one for one in everyone if name in one.tensors)
        raise UserError(
            f"{name} is in {has.label} and not in {lacking[0].label}"
            f"{f'; so are {len(absent) - 1} more tensors' * (len(absent) > 1)}.",
            "Add --missing keep to make such tensors of the models that have them, or --missing "
            "base to give those that lack them the base's; the report lists them.",
        )
    for name, lacking in absent.items():
        if missing == "base" and (base is None or base in lacking):
            raise UserError(
                f"{name} is not in {base.label if base else 'a base, for there is none'}, which "
                "--missing base would take it from.",
                "Use --missing keep.",
            )
    told = [
        f"{name} is not in {', '.join(one.label for one in lacking)}: "
        + ("the base's was taken" if missing == "base" else "made of those that have it")
        for name, lacking in absent.items()
    ]
    # A model that lacks a tensor of the base then counts as having left it as it was.
    return tensors, {} if missing == "base" else absent, told


def _agreed(
    known: TensorInfo, info: TensorInfo, everyone: Sequence[Source], name: str
) -> TensorInfo:
    """What a tensor is that several models have.

    Raises:
        UserError: It has different shapes, or is whole numbers in one only.
    """
    if known.shape != info.shape:
        shapes = {one.label: one.tensors[name].shape for one in everyone if name in one.tensors}
        rows = any(name in one.tensors and _of_tokens(one, one.tensors[name]) for one in everyone)
        raise UserError(
            f"{name} has different shapes: "
            + ", ".join(f"{tuple(shape)} in {label}" for label, shape in shapes.items())
            + ".",
            "Models with another vocabulary are merged with --align, if each has a tokenizer.json."
            if rows
            else "Only models of one architecture and size can be merged.",
        )
    if known.dtype == info.dtype:
        return known
    if known.dtype.is_floating_point != info.dtype.is_floating_point:
        raise UserError(
            f"{name} is stored as {known.dtype} in one model and as {info.dtype} in another.",
            "Convert one of them.",
        )
    return replace(known, dtype=torch.promote_types(known.dtype, info.dtype))


def _digests(models: Sequence[Source]) -> list[str]:
    """A digest of each model: of the ends of its tensors, and of all where those are the same."""
    found = [_digest(one, whole=False) for one in models]
    return [
        one + _digest(model, whole=True) if found.count(one) > 1 else one
        for one, model in zip(found, models, strict=True)
    ]


def _digest(source: Source, *, whole: bool) -> str:
    digest = hashlib.sha256()
    with Reader(source) as reader:
        for name, info in sorted(source.tensors.items()):
            digest.update(f"{name} {info.dtype} {info.shape}".encode())
            ends = [(0, _SAMPLE), (max(0, info.count - _SAMPLE), info.count)]
            step = 1 << 22
            runs = [(at, at + step) for at in range(0, info.count, step)] if whole else ends
            for start, stop in runs:
                digest.update(raw_bytes(reader.read(name, start, stop)))
    return digest.hexdigest()


def companions_of(found: Parents) -> dict[str, Path]:
    """The files that go beside the result's weights."""
    return {file.name: file for file in found.described.companions}
