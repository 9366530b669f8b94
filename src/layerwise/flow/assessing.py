"""Evaluate: open, check everything, load each model once at most, ask, and say what came of it."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.errors import UserError
from layerwise.core.reading.checkpoint import Checkpoint, open_checkpoint
from layerwise.core.reading.labelled import Labels
from layerwise.core.reading.text import Text, Windows, windows
from layerwise.core.running.walk import FLOOR_DTYPE
from layerwise.core.telling.outcome import Comparison, Detection, Evaluation, ImageScores, TaskScore
from layerwise.evaluate.images import check_classifier, compare_images
from layerwise.evaluate.pictures import (
    Images,
    Pictures,
    Preparer,
    checkpoint_preparer,
    in_classes,
    module_preparer,
    read_pictures,
)
from layerwise.evaluate.tasks import (
    FoundTasks,
    Tasks,
    answer_tasks,
    check_model,
    check_settings,
    find,
)
from layerwise.evaluate.text import compare
from layerwise.flow.detecting import Suspects, detected, suspects
from layerwise.flow.loading import answers, load
from layerwise.flow.sparsifying import (
    CALIBRATION_WINDOWS,
    Judged,
    Skipping,
    kind,
    sparsified,
)

Loader = Callable[[torch.dtype], Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a model is to be evaluated on; a text if nothing is named.

    Attributes:
        text: Held-out text.
        samples: Windows of it.
        length: Tokens per window.
        noise_floor: Compare the original in bfloat16 with itself, where there is an original.
        tasks: Tasks of the harness.
        images: Labelled pictures.
        mean: Mean of each channel of them, instead of the checkpoint's own.
        std: Standard deviation of each channel.
        sparsify: What the model is to leave out; it is then compared with itself.
        detect: Texts that a model may have written.
    """

    text: Text | None = None
    samples: int = 128
    length: int = 256
    noise_floor: bool = True
    tasks: Tasks | None = None
    images: Images | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    sparsify: Skipping | None = None
    detect: Labels | Sequence[str] | None = None


@dataclass(frozen=True)
class _Checked:
    """What was asked, found and fit for the models, none of which is loaded yet."""

    windows: Windows | None
    calibration: Windows | None
    tasks: FoundTasks | None
    pictures: tuple[Pictures, Preparer, str] | None
    suspects: Suspects | None


def assess(
    model: str | Path | nn.Module,
    against: str | Path | nn.Module | None,
    asked: Asked,
    *,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Evaluate a model, alone or against the one it was made from.

    Args:
        model: Path, hub id or `builtin:tiny`; or an image classifier in memory.
        against: The model it was made from, given likewise.
        asked: On what.
        trust_remote_code: Let checkpoints bring their own Python.

    Raises:
        UserError: Something is not as it must be; as far as can be, before a model is loaded.
    """
    if asked.images is None and (asked.mean is not None or asked.std is not None):
        raise UserError("a mean or std was given, and no images.", "Give images too.")
    if asked.sparsify is not None:
        _check_sparse(asked.sparsify, asked, against)
    if isinstance(model, nn.Module) or isinstance(against, nn.Module):
        return _assess_modules(model, against, asked)
    source = open_checkpoint(model)
    base = None if against is None else open_checkpoint(against)
    checked = _check(source, base, asked)
    loaded = _loader(source, trust_remote_code)
    base_loaded = None if base is None else _loader(base, trust_remote_code)
    tasks: Sequence[TaskScore] = ()
    notes: Sequence[str] = ()
    if checked.tasks is not None:
        plain = functools.partial(loaded, torch.float32)
        base_plain = None if base_loaded is None else functools.partial(base_loaded, torch.float32)
        tasks, notes = answer_tasks(checked.tasks, source, plain, base, base_plain)
    if asked.sparsify is not None:
        return _sparse(source.label, checked, loaded, asked.sparsify, asked.noise_floor)
    text, floor = _on_text(checked.windows, loaded, base_loaded, asked.noise_floor)
    return Evaluation(
        model=source.label,
        against=None if base is None else base.label,
        text=text,
        noise_floor=floor,
        tasks=tasks,
        images=_on_images(checked.pictures, loaded, base_loaded),
        notes=notes,
        detection=_on_suspects(checked.suspects, loaded),
    )


def _check_sparse(wanted: Skipping, asked: Asked, against: object) -> None:
    """Refuse what a model that leaves work out is not judged on."""
    method = wanted.found()
    if against is not None or asked.tasks is not None or asked.detect is not None:
        raise UserError(
            f"with {method.id} a model is compared with itself, on text or images.",
            "Leave out the other model, the tasks and the texts to detect.",
        )
    pictures = kind(method) == "attentions"
    if pictures and (asked.images is None or asked.text is not None):
        raise UserError(f"{method.id} drops tokens of pictures.", "Give images, and no text.")
    if not pictures and asked.images is not None and kind(method) != "activations":
        raise UserError(f"{method.id} is for models of text.", "Give a text instead of images.")
    if kind(method) == "scores" and wanted.calibration is None:
        raise UserError(
            f"{method.id} goes by what blocks contribute to the answers to a text.",
            "Give a calibration text.",
        )


def _sparse(
    label: str, checked: _Checked, loaded: Loader, wanted: Skipping, noise_floor: bool
) -> Evaluation:
    """A model with work left out, against itself as it is."""
    model = loaded(torch.float32)
    calibration = None if checked.calibration is None else checked.calibration.ids
    with sparsified(model, wanted, calibration) as sparse:
        judged = Judged(sparse, wanted)
        if checked.pictures is not None:
            pictures, prepare, said = checked.pictures
            asks = [judged.asked(model, dense=dense) for dense in (False, True)]
            images = compare_images(pictures, prepare, said, *asks)
            return Evaluation(label, label, images=images, savings=judged.savings())
        assert checked.windows is not None
        ids = checked.windows.ids
        results = [judged.answers(ids)]
        if noise_floor:
            results.append(answers(loaded(FLOOR_DTYPE), ids))
        first = judged.first(ids.shape[1])
        found = compare(checked.windows, results, judged.dense(ids), first)
        return Evaluation(
            label,
            label,
            text=found[0],
            noise_floor=found[1] if noise_floor else None,
            savings=judged.savings(ids.shape[1]),
        )


def _on_suspects(found: Suspects | None, loaded: Loader) -> Detection | None:
    return None if found is None else detected(loaded(torch.float32), found)


def _check(source: Checkpoint, base: Checkpoint | None, asked: Asked) -> _Checked:
    """Read what was asked for, and refuse what does not fit the models."""
    sources = [one for one in (source, base) if one is not None]
    pictures = None
    if asked.images is not None:
        for one in sources:
            check_classifier(one)
        channels: int = source.config.get("num_channels", 3)
        prepare, said = checkpoint_preparer(source, asked.mean, asked.std)
        shown = in_classes(read_pictures(asked.images, channels=channels), source)
        prepare(shown.read(0, 1))
        pictures = shown, prepare, said
    tasks = None
    if asked.tasks is not None:
        check_settings(asked.tasks)
        for one in sources:
            check_model(one)
        tasks = find(asked.tasks)
    chosen = None
    found = None if asked.detect is None else suspects(source, asked.detect, asked.length)
    if asked.text is not None or (tasks is None and pictures is None and found is None):
        text = "builtin" if asked.text is None else asked.text
        chosen = windows(source, text, samples=asked.samples, length=asked.length, role="heldout")
        if base and base.config.get("vocab_size") != source.config.get("vocab_size"):
            raise UserError(
                f"{source.label} has {source.config.get('vocab_size')} tokens, {base.label} has "
                f"{base.config.get('vocab_size')}.",
                "Give the model that it was made from.",
            )
    calibration = None
    if asked.sparsify is not None and asked.sparsify.calibration is not None:
        calibration = windows(
            source,
            asked.sparsify.calibration,
            samples=CALIBRATION_WINDOWS,
            length=asked.length,
        )
    return _Checked(chosen, calibration, tasks, pictures, found)


def _loader(source: Checkpoint, trust_remote_code: bool) -> Loader:
    """Loads a checkpoint, once for each dtype."""

    @functools.cache
    def loaded(dtype: torch.dtype) -> Any:
        return load_or_say(source, dtype, trust_remote_code)

    return loaded


def load_or_say(
    source: Checkpoint, dtype: torch.dtype, trust_remote_code: bool, budget: int | None = None
) -> Any:
    """A checkpoint loaded with transformers, or what a budget has room for.

    Raises:
        UserError: It cannot be; the message passes on what transformers says.
    """
    try:
        return load(source, dtype=dtype, trust_remote_code=trust_remote_code, budget=budget)
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError, KeyError) as error:
        raise UserError(
            f"transformers cannot load {source.label}: {error}",
            "See what it says; the checkpoint or its config.json may be damaged.",
        ) from error


def _on_text(
    chosen: Windows | None, loaded: Loader, base: Loader | None, noise_floor: bool
) -> tuple[Comparison | None, Comparison | None]:
    """The comparison, and the noise floor if there is an original to take it of."""
    if chosen is None:
        return None, None
    results = [answers(loaded(torch.float32), chosen.ids)]
    if base is None:
        return compare(chosen, results, None)[0], None
    if noise_floor:
        results.append(answers(base(FLOOR_DTYPE), chosen.ids))
    compared = compare(chosen, results, answers(base(torch.float32), chosen.ids))
    return compared[0], compared[1] if noise_floor else None


def _on_images(
    found: tuple[Pictures, Preparer, str] | None, loaded: Loader, base: Loader | None
) -> ImageScores | None:
    if found is None:
        return None
    pictures, prepare, said = found
    before = None if base is None else base(torch.float32)
    return compare_images(pictures, prepare, said, loaded(torch.float32), before)


def _assess_modules(
    model: str | Path | nn.Module, against: str | Path | nn.Module | None, asked: Asked
) -> Evaluation:
    """Modules in memory are judged on images only: what else they take is not known.

    Raises:
        UserError: Something else was asked for, or a module is not in evaluation mode.
    """
    given = [one for one in (model, against) if one is not None]
    modules = [one for one in given if isinstance(one, nn.Module)]
    if len(modules) < len(given):
        raise UserError(
            "a module in memory and a path are not compared with each other.",
            "Give both as modules, or both as paths.",
        )
    others = (asked.text, asked.tasks, asked.detect)
    if asked.images is None or any(one is not None for one in others):
        raise UserError(
            f"a module in memory ({type(model).__name__}) is evaluated on images only.",
            "Give images=…; for text and tasks, save the model and give its directory.",
        )
    for module in modules:
        if any(part.training for part in module.modules()):
            raise UserError(
                f"{type(module).__name__} is in training mode.", "Call .eval() on it first."
            )
    pictures = read_pictures(asked.images)
    prepare, said = module_preparer(asked.mean, asked.std)
    if asked.sparsify is not None:
        return _sparse_module(modules[0], asked.sparsify, pictures, prepare, said)
    asks = [functools.partial(_ask, module) for module in modules]
    scores = compare_images(pictures, prepare, said, asks[0], asks[1] if len(asks) > 1 else None)
    labels = [type(module).__name__ for module in modules]
    return Evaluation(labels[0], labels[1] if len(labels) > 1 else None, images=scores)


def _sparse_module(
    module: nn.Module, wanted: Skipping, pictures: Pictures, prepare: Preparer, said: str
) -> Evaluation:
    label = type(module).__name__
    with sparsified(module, wanted, None) as sparse:
        judged = Judged(sparse, wanted)
        ask = functools.partial(_ask, module)
        asks = [judged.asked(ask, dense=dense) for dense in (False, True)]
        images = compare_images(pictures, prepare, said, *asks)
        return Evaluation(label, label, images=images, savings=judged.savings())


def _ask(module: nn.Module, pixels: Tensor) -> Any:
    """What a module answers, wherever its parameters are."""
    held = next(module.parameters(), pixels)
    found = module(pixels.to(device=held.device, dtype=held.dtype))
    logits: Any = getattr(found, "logits", found)
    return logits.cpu() if isinstance(logits, Tensor) else logits
