"""Merge: open, check, order, gather, stream, judge, report."""

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from layerwise.core import catalogue, memory
from layerwise.core.environment import environment
from layerwise.core.errors import UserError
from layerwise.core.keeping.staging import arrange, check_target, stage
from layerwise.core.merging.blend import Blend, Rule, lay_out, to_yaml
from layerwise.core.merging.mix import Given, Mixer, mix
from layerwise.core.merging.signatures import Patched, is_signature, read_signature
from layerwise.core.packing import raw_bytes
from layerwise.core.progress import Progress
from layerwise.core.reading.assembled import Assembled
from layerwise.core.reading.checkpoint import (
    DTYPES,
    Checkpoint,
    ModuleSource,
    Source,
    TensorInfo,
    open_source,
)
from layerwise.core.reading.parents import Missing, Parents, companions_of, parents
from layerwise.core.reading.symmetry import symmetries
from layerwise.core.reading.text import Text
from layerwise.core.telling.merged import Barrier, Fit, Merge, Score
from layerwise.flow.fitting import fit
from layerwise.flow.gathering import gathered, moments, shown, texts_of
from layerwise.flow.identity import merge_identity
from layerwise.flow.judging import Judge, Loss, judge_of
from layerwise.flow.preparing import check_disk
from layerwise.flow.repairing import batch_statistics

# Points between two models at which a barrier is looked for, both ends included.
POINTS = 5
# Beyond so many models the ways between every two of them are too many to look at.
_MOST_PAIRED = 4
# What models show of a calibration text.
_FROM_TEXT = frozenset({"grams", "fishers", "moments"})
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Wanted:
    """How models are to be merged.

    Attributes:
        method: Name of the method.
        rules: Weights and options by pattern of tensors.
        blend: Both for every tensor, instead of rules.
        dtype: What floats are stored in; "" for what the models store.
        missing: What becomes of a tensor that some of the models lack.
        align: Match rows of embeddings and heads by what their tokens are.
        calibration: A text for each model, or one for all.
        samples: Windows of each.
        length: Tokens per window.
        texts: Texts that every model and the result are compared on.
        text_samples: Windows of each.
        fit: Text that coefficients are found on; None takes them as they are given.
        fit_evaluations: Most models that are tried for that.
        loss: What a module in memory loses, instead of texts.
        norms: Inputs that statistics of the result's batch norms are estimated again on.
        sliced: Models have only some of the layers, and that is no news.
    """

    method: str = "linear"
    rules: Mapping[str, Rule] = field(default_factory=dict[str, Rule])
    blend: Blend | None = None
    dtype: str = ""
    missing: Missing = "refuse"
    align: bool = False
    calibration: Sequence[Text] = ()
    samples: int = 64
    length: int = 256
    texts: Sequence[Text] = ()
    text_samples: int = 32
    fit: Text | None = None
    fit_evaluations: int = 200
    loss: Loss | None = None
    norms: torch.Tensor | None = None
    sliced: bool = False


def merge(
    models: Sequence[str | Path | nn.Module | Source],
    out: str | Path,
    wanted: Wanted,
    progress: Progress,
    *,
    base: str | Path | nn.Module | Source | None = None,
    restart: bool = False,
    trust_remote_code: bool = False,
    recipe: Mapping[str, Any] | None = None,
) -> Merge:
    """Merge models and write the result as a directory.

    Args:
        models: Paths, hub ids, modules, or sources that are open already.
        out: Directory to make.
        wanted: How.
        progress: Is told of the stages.
        base: The model that the others were tuned from.
        restart: Throw away a stopped run with other options.
        trust_remote_code: Let checkpoints bring their own Python.
        recipe: How this was asked for; written beside the output.

    Raises:
        UserError: The output was not made; the message says why.
    """
    begun, used = time.perf_counter(), memory.cpu_seconds()
    target = Path(os.path.abspath(Path(out).expanduser()))
    check_target(target)
    dtype = _dtype(wanted.dtype)
    method = catalogue.get(f"merge/{wanted.blend.method if wanted.blend else wanted.method}")
    _check_needs(method, len(models), base, wanted)
    memory.settle()
    ground = None if base is None else _opened(base)
    given = [_opened(one, ground) for one in models]
    weights = _given_weights(wanted, len(given))
    found = parents(given, ground, missing=wanted.missing, align=wanted.align, beside=weights)
    blend = wanted.blend or lay_out(method.name, wanted.rules, list(found.tensors), len(given))
    outputs = _outputs(found, dtype)
    arrangement = arrange(outputs.values())
    check_disk(target, arrangement.size)
    if wanted.sliced and (wanted.texts or wanted.fit):
        raise UserError(
            "models of which only some layers are taken are not compared here.",
            "Leave out --text and --fit; `layerwise evaluate OUT` judges the result.",
        )
    judge = judge_of(
        found.described if isinstance(found.described, ModuleSource) else _plain(found),
        wanted.texts,
        wanted.loss,
        samples=wanted.text_samples,
        length=wanted.length,
        trust_remote_code=trust_remote_code,
    )
    fitting = _fit_judges(found, wanted, trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="layerwise-") as kept, contextlib.ExitStack() as open_:
        evidence = _evidence(
            method, found, wanted, Path(kept), fitting, progress, trust_remote_code
        )
        fitted: Fit | None = None
        if wanted.fit is not None and fitting is not None and "loss" not in method.evidence:
            with Mixer(found, blend, evidence) as mixer:
                blend, fitted = fit(mixer, *fitting, wanted.fit_evaluations, progress)
        mixer = open_.enter_context(Mixer(found, blend, evidence))
        if wanted.norms is not None:
            mixer.given = replace(evidence, instead=_statistics(mixer, wanted.norms))
        first = found.given.index(0) if "first" in method.evidence else -1
        asked = [str(dtype), wanted.missing, wanted.align, _digest_of(mixer.given), first]
        identity = merge_identity(found, blend, asked)
        staging = open_.enter_context(stage(target, arrangement, identity, restart=restart))
        rows = mix(mixer, staging, outputs, progress)
        labels = [one.label for one in given]
        base_label = ground.label if ground else ""
        staging.add(_small_files(found, dtype, recipe or {}))
        staging.add({"merge.yaml": to_yaml(blend, labels, base_label, wanted.dtype).encode()})
        scores, barriers = _judged(judge, found, staging.folder, outputs, progress)
        done = Merge(
            models=labels,
            base=base_label,
            out=str(out),
            method=method.name,
            dtype=_dtypes(outputs),
            rows=rows,
            bytes=arrangement.size,
            seconds=time.perf_counter() - begun,
            cpu_seconds=memory.cpu_seconds() - used,
            peak_bytes=memory.peak_bytes(),
            scores=scores,
            barriers=barriers,
            fit=fitted,
            notes=[] if wanted.sliced else list(found.notes),
            environment=environment("cpu"),
            recipe=recipe or {},
        )
        told = json.dumps(done.as_json(), indent=2) + "\n"
        staging.add({"report.json": told.encode()})
        staging.publish()
    return done


def _fit_judges(
    found: Parents, wanted: Wanted, trust_remote_code: bool
) -> tuple[Judge, Judge] | None:
    """What judges a trial, and what judges the outcome on the half that was kept aside."""
    if wanted.fit is None and wanted.loss is None:
        return None
    judge = judge_of(
        _plain(found),
        [] if wanted.fit is None else [wanted.fit],
        wanted.loss,
        samples=2 * wanted.text_samples,
        length=wanted.length,
        trust_remote_code=trust_remote_code,
    )
    assert judge is not None
    if wanted.loss is not None:
        return judge, judge
    text = judge.texts[0]
    if len(text.ids) < 2:
        raise UserError(
            f"{text.label} has one window of {wanted.length} tokens: none can be kept aside.",
            "Give a longer text to --fit, or a smaller --length.",
        )
    half = len(text.ids) // 2
    parts = (text.ids[:half], text.ids[half:])
    first, second = (replace(judge, texts=[replace(text, ids=ids)]) for ids in parts)
    return first, second


def _evidence(
    method: catalogue.Method,
    found: Parents,
    wanted: Wanted,
    folder: Path,
    fitting: tuple[Judge, Judge] | None,
    progress: Progress,
    trust_remote_code: bool,
) -> Given:
    """What the method reads beside weights, in the order of the parents."""
    words = set(method.evidence)
    loss = None
    if "loss" in words and fitting is not None:
        loss = functools.partial(_tried, fitting[0])
    known = Given(loss=loss, symmetries=_symmetries(words, found))
    if not words & _FROM_TEXT:
        return known
    if "moments" in words:
        return replace(known, moments=_moments(found, wanted, folder, progress, trust_remote_code))
    texts = found.ordered(texts_of(found.models, wanted.calibration))
    seen = [
        shown(one, text, wanted.samples, wanted.length)
        for one, text in zip(found.models, texts, strict=True)
    ]
    what = "grams" if "grams" in words else "fishers"
    made = gathered(what, found.models, seen, folder, progress, trust_remote_code=trust_remote_code)
    return replace(known, grams=made) if what == "grams" else replace(known, fishers=made)


def _moments(
    found: Parents, wanted: Wanted, folder: Path, progress: Progress, trust_remote_code: bool
) -> Mapping[str, torch.Tensor]:
    """What layers of all models read of one text, together."""
    if len(wanted.calibration) != 1:
        raise UserError(
            f"{len(wanted.calibration)} calibration texts were given, and all models are to answer "
            "to the same one.",
            "Give one.",
        )
    text = shown(found.described, wanted.calibration[0], wanted.samples, wanted.length)
    return moments(found.models, text, folder, progress, trust_remote_code=trust_remote_code)


def _statistics(mixer: Mixer, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Statistics of the batch norms of what is made; all of it is in memory meanwhile."""
    infos = mixer.found.tensors.items()
    made = {name: mixer.tensor(name) for name, info in infos if info.dtype.is_floating_point}
    return batch_statistics(mixer.found.described, made, inputs)


def _symmetries(words: set[str], found: Parents) -> Any:
    return symmetries(found.described) if "symmetries" in words else None


def _tried(judge: Judge, state: Mapping[str, torch.Tensor]) -> float:
    """What a model with these tensors loses on the text to fit."""
    judge.put(state)
    losses = judge.losses()
    return sum(losses) / len(losses)


def _digest_of(evidence: Given) -> str:
    """A digest of what was gathered: another text makes another merge."""
    digest = hashlib.sha256()
    for source in [*evidence.grams, *evidence.fishers]:
        for name in source.tensors:
            digest.update(name.encode() + bytes(raw_bytes(source.read(name))))
    for name, one in [*evidence.moments.items(), *evidence.instead.items()]:
        digest.update(name.encode() + bytes(raw_bytes(one)))
    return digest.hexdigest()


def _opened(model: str | Path | nn.Module | Source, base: Source | None = None) -> Source:
    """A model; a signature is the base with what it adds.

    Raises:
        UserError: A signature has no base to be added to.
    """
    if isinstance(model, str | Path) and is_signature(Path(model)):
        if base is None:
            raise UserError(
                f"{model} is a signature, and there is no model to add it to.",
                "Give that model with --base, and a merge that adds differences: "
                "--method task_arithmetic --task_arithmetic-scale 1.",
            )
        return Patched(base, read_signature(Path(model)))
    if isinstance(model, str | Path | nn.Module):
        return open_source(model)
    return model


def _dtype(name: str) -> torch.dtype | None:
    if name and name not in FLOATS:
        raise UserError(f"there is no dtype {name!r} to store.", f"Write {', '.join(FLOATS)}.")
    return FLOATS.get(name)


def _check_needs(method: catalogue.Method, models: int, base: Any, wanted: Wanted) -> None:
    """Refuse a method that reads what was not given, before anything is opened."""
    if method.merges not in (None, models):
        beside = ", and their base" if "base" in method.evidence else ""
        raise UserError(
            f"{method.id} merges {method.merges} model{'s' * (method.merges != 1)}{beside}; "
            f"{models} were given.",
            "Give so many, or another method (`layerwise methods merge` lists them).",
        )
    if base is None and {"base", "origin"} & set(method.evidence):
        raise UserError(
            f"{method.id} needs the model that the others were tuned from.", "Give it with --base."
        )
    text = _FROM_TEXT & set(method.evidence)
    if text and not wanted.calibration and wanted.loss is None:
        raise UserError(
            f"{method.id} learns from what each model sees of a text, and none was given.",
            "Add --calibration TEXT, once for all models or once for each, in their order.",
        )
    if "loss" in method.evidence and wanted.fit is None and wanted.loss is None:
        raise UserError(
            f"{method.id} tries models on a text, and none was given.", "Add --fit TEXT."
        )


def _given_weights(wanted: Wanted, models: int) -> list[Any]:
    """What each model is merged with, to order models of equal content by."""
    if wanted.blend is not None:
        settings = wanted.blend.settings.values()
        return [[float(one.shares[k]) for one in settings] for k in range(models)]
    rules = [rule.weights for rule in wanted.rules.values() if rule.weights]
    return [[row[k] if k < len(row) else 0 for row in rules] for k in range(models)]


def _outputs(found: Parents, dtype: torch.dtype | None) -> dict[str, TensorInfo]:
    """Every tensor as it is stored; whole numbers, and floats of 8 bits, keep their dtype."""
    return {
        name: replace(info, dtype=dtype) if dtype and info.dtype in FLOATS.values() else info
        for name, info in found.tensors.items()
    }


def _dtypes(outputs: Mapping[str, TensorInfo]) -> str:
    names = {dtype: name for name, dtype in DTYPES.items()}
    floats = {names[one.dtype] for one in outputs.values() if one.dtype.is_floating_point}
    return ", ".join(sorted(floats))


def _plain(found: Parents) -> Source:
    """The checkpoint whose class the result is loaded as."""
    plain = next((one for one in [found.base, *found.models] if isinstance(one, Checkpoint)), None)
    return found.described if plain is None else plain


def _small_files(
    found: Parents, dtype: torch.dtype | None, recipe: Mapping[str, Any]
) -> dict[str, bytes | Path]:
    files: dict[str, bytes | Path] = dict(companions_of(found))
    config = dict(found.described.config)
    if dtype is not None:
        named = {name for name in ("dtype", "torch_dtype") if name in config} or {"dtype"}
        config |= dict.fromkeys(named, str(dtype).removeprefix("torch."))
    if "config.json" in files and (dtype is not None or isinstance(found.described, Assembled)):
        files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    if recipe:
        files["recipe.yaml"] = yaml.safe_dump(dict(recipe), sort_keys=False).encode()
    return files


def _judged(
    judge: Judge | None,
    found: Parents,
    folder: Path,
    outputs: Mapping[str, TensorInfo],
    progress: Progress,
) -> tuple[list[Score], list[Barrier]]:
    """What every model and the result lose on every text, and the ways between the models."""
    if judge is None:
        return [], []
    back = {place: n for n, place in enumerate(found.given)}
    models = [found.models[back[place]] for place in range(len(back))]
    result = open_source(folder)
    named = [(one.label, one) for one in [*([found.base] if found.base else []), *models]]
    progress.stage("judge", len(named) + 1)
    scores: list[Score] = []
    floats = [name for name, info in outputs.items() if info.dtype.is_floating_point]
    for label, one in [*named, ("merged", result)]:
        judge.put(_Floats(one, [name for name in floats if name in one.tensors]))
        scores += [
            Score(label, text, loss, tokens)
            for text, loss, tokens in zip(judge.labels, judge.losses(), judge.tokens, strict=True)
        ]
        progress.step(label)
    return scores, _barriers(judge, models, floats, scores, progress)


def _barriers(
    judge: Judge,
    models: Sequence[Source],
    floats: Sequence[str],
    scores: Sequence[Score],
    progress: Progress,
) -> list[Barrier]:
    if len(models) > _MOST_PAIRED:
        return []
    pairs = [(a, b) for n, a in enumerate(models) for b in models[n + 1 :]]
    progress.stage("barriers", len(pairs))
    ends = {(one.model, one.text): one.loss for one in scores}
    made: list[Barrier] = []
    for first, second in pairs:
        names = [name for name in floats if name in first.tensors and name in second.tensors]
        inner = [n / (POINTS - 1) for n in range(1, POINTS - 1)]
        along: list[list[float]] = []
        for t in inner:
            judge.put(_Between(first, second, t, names))
            along.append(judge.losses())
        for n, text in enumerate(judge.labels):
            start, end = ends[first.label, text], ends[second.label, text]
            losses = [start, *(one[n] for one in along), end]
            over = [
                loss - ((1 - t) * start + t * end)
                for t, loss in zip(inner, losses[1:-1], strict=True)
            ]
            top = max(range(len(over)), key=over.__getitem__)
            made.append(Barrier(first.label, second.label, text, over[top], inner[top], losses))
        progress.step(f"{first.label} to {second.label}")
    return made


class _Floats(Mapping[str, torch.Tensor]):
    """Some tensors of a source, read when they are asked for."""

    def __init__(self, source: Source, names: Sequence[str]) -> None:
        self.source = source
        self.names = names

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.source.read(name).float()

    def __iter__(self) -> Any:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _Between(_Floats):
    """Tensors part of the way from one source to another."""

    def __init__(self, first: Source, second: Source, t: float, names: Sequence[str]) -> None:
        super().__init__(first, names)
        self.second = second
        self.t = t

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.lerp(super().__getitem__(name), self.second.read(name).float(), self.t)
