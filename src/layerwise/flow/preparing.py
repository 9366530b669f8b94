"""Before anything is written: the model opened, its texts read, and all that can fail, checked."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from layerwise import builtin, export
from layerwise.core import catalogue, memory
from layerwise.core.catalogue import EVIDENCE
from layerwise.core.errors import UserError
from layerwise.core.extras import need
from layerwise.core.format import Format
from layerwise.core.keeping.staging import Arrangement, partial_folder
from layerwise.core.plan import Plan, check_plan
from layerwise.core.reading.checkpoint import ModuleSource, Source, TensorInfo
from layerwise.core.reading.families import LANGUAGE_MODELS
from layerwise.core.reading.labelled import Labelled, Labels, labelled
from layerwise.core.reading.structure import Structure
from layerwise.core.reading.text import Text, Windows, windows
from layerwise.core.rewriting.rewriting import original
from layerwise.core.running.ablation import ANSWERED
from layerwise.core.running.runner import Runner
from layerwise.core.running.tuning import check_tuning
from layerwise.export.servers import check_server
from layerwise.flow.loading import need_packages

Proving = Literal["auto", "logits", "none"]
# Windows whose logits are compared after the files are loaded back.
PROOF_WINDOWS = 8


@dataclass(frozen=True, slots=True)
class Texts:
    """What a run reads, and how much of it.

    Attributes:
        calibration: Text that evidence is gathered on; None for the default of the model.
        samples: Windows of it.
        length: Tokens per window.
        heldout: Text that the result is compared on; None for one that calibration did not use.
        heldout_samples: Windows of it.
        noise_floor: Whether the original in bfloat16 is compared with itself.
        labels: Texts of known classes, for measures that read them.
        label_examples: How many of them.
    """

    calibration: Text | None = None
    samples: int = 64
    length: int = 256
    heldout: Text | None = None
    heldout_samples: int = 32
    noise_floor: bool = True
    labels: Labels | None = None
    label_examples: int = 1000


@dataclass(frozen=True)
class Prepared:
    """A model, opened, with what its wish needs: nothing is written yet."""

    source: Source
    found: Structure
    runner: Runner | None
    calibration: Windows | None
    heldout: Windows | None
    noise_floor: bool = False
    labelled: Labelled | None = None


def prepare(
    source: Source,
    found: Structure,
    methods: Sequence[catalogue.Method],
    texts: Texts,
    *,
    needing: Sequence[str] = (),
    learning: Sequence[str] = (),
    format: Format | None = None,
    proof: Proving = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Prepared:
    """Read the texts that the methods and the proof need, and make what runs the model.

    `needing` names what else cannot do without a calibration text, `learning` what else reads it
    if there is one.

    Raises:
        UserError: A text that a method needs is not there, the model cannot run, or what loads
            `format` back for the proof is not installed.
    """
    memory.settle()
    device = device_of(device)
    needy = [*(method.id for method in methods if method.calibrated), *needing]
    text = calibration_text(source, texts)
    if needy and text is None:
        raise UserError(
            f"{needy[0]} learns from what {source.label} sees of a text, and no text was given.",
            "Add --calibration TEXT (a text file, a JSON list of strings, a hub data set, or "
            "`builtin`); `layerwise methods --needs nothing` lists the methods that need none.",
        )
    if text is not None:
        needy += learning
    check_loss(source, methods)
    probing = _labelled(source, methods, texts)
    if isinstance(original(source), ModuleSource):
        if format is not None and format.directory and proof != "none":
            raise UserError(
                f"{source.label} is in memory, and {' and '.join(format.packages)} load a model's "
                "directory.",
                "Save it (model.save_pretrained(DIR)) and give DIR, or write --format layerwise.",
            )
        return _prepared_module(source, found, texts, bool(needy), proof, device)
    proving = _proving(source, proof)
    if proving and format is not None:
        purpose = "the proof (or give --proof none)"
        need_packages(format, purpose)
        if format.adapts and any(method.verb == "compensate" for method in methods):
            need("peft", purpose)
    if not needy and not proving and probing is None:
        return Prepared(source, found, None, None, None)
    runner = Runner(source, found, device=device, trust_remote_code=trust_remote_code)
    calibration = None
    if needy and text is not None:
        calibration = windows(source, text, samples=texts.samples, length=texts.length)
    heldout = _heldout(source, text, texts, calibration) if proving else None
    floor = texts.noise_floor and heldout is not None and not runner.whole
    return Prepared(source, found, runner, calibration, heldout, floor, probing)


def _labelled(source: Source, methods: Sequence[catalogue.Method], texts: Texts) -> Labelled | None:
    """The labelled texts, where a method reads them."""
    needy = [method.id for method in methods if method.labelled]
    if not needy:
        return None
    if texts.labels is None:
        raise UserError(
            f"{needy[0]} looks for what blocks know of texts of known classes, and none were "
            "given.",
            "Add --labels FILE to `layerwise inspect`: lines of text, tab, label, or JSON lines "
            "with text and label.",
        )
    if isinstance(source, ModuleSource):
        raise UserError(
            f"{source.label} is in memory, and has no tokenizer for labelled texts.",
            "Save it with its tokenizer (save_pretrained(DIR)) and give DIR.",
        )
    return labelled(source, texts.labels, examples=texts.label_examples, length=texts.length)


def calibration_text(source: Source, texts: Texts) -> Text | None:
    """What evidence is gathered on: what was given, or what comes with a built-in model."""
    if texts.calibration is None and source.label == builtin.NAME:
        return "builtin"
    return texts.calibration


def check_loss(source: Source, methods: Sequence[catalogue.Method]) -> None:
    """Refuse what takes a distribution for a model that answers with features.

    Raises:
        UserError: It names a method that reads them.
    """
    answering = [method.id for method in methods if ANSWERED.intersection(method.evidence)]
    architecture = (source.config.get("architectures") or [""])[0]
    if answering and architecture and not architecture.endswith(LANGUAGE_MODELS):
        raise UserError(
            f"{answering[0]} reads how a model foretells tokens, and {source.label} is a "
            f"{architecture}.",
            "Give the model with its language-modelling head.",
        )
    needy = [m.id for m in methods if any(EVIDENCE[word] == "gradients" for word in m.evidence)]
    if needy and architecture and not _has_head(architecture):
        raise UserError(
            f"{needy[0]} reads gradients of a loss, and {source.label} is a {architecture}, which "
            "answers with no distribution that has one.",
            "Give the model with its head, or a method that needs no gradients "
            "(`layerwise methods --needs calibration`).",
        )


def _has_head(architecture: str) -> bool:
    return "For" in architecture or architecture.endswith(LANGUAGE_MODELS)


def device_of(name: str) -> str:
    """Where blocks are put.

    Raises:
        UserError: There is no such device, or none here.
    """
    there = torch.cuda.is_available()
    if name not in ("cpu", "cuda", "auto"):
        raise UserError(f"there is no device {name!r}.", "Give cpu, cuda or auto.")
    if name == "cuda" and not there:
        raise UserError("there is no CUDA device here.", "Use --device auto or --device cpu.")
    return "cuda" if there and name != "cpu" else "cpu"


def _prepared_module(
    source: Source, found: Structure, texts: Texts, needy: bool, proof: Proving, device: str
) -> Prepared:
    """A module takes tensors as they are; without others, calibration inputs prove the files."""
    given = {"calibration": texts.calibration, "text": texts.heldout}
    for name, text in given.items():
        if text is not None and not isinstance(text, Tensor):
            raise UserError(
                f"{name} is a {type(text).__name__}, and a module in memory takes tensors.",
                "Give a batch of what the module is called with.",
            )
    calibration, heldout = (
        Windows(text, f"the {name} tensor") if isinstance(text, Tensor) else None
        for name, text in given.items()
    )
    shown = None if proof == "none" else heldout or calibration
    runs = shown is not None or (needy and calibration is not None)
    runner = Runner(source, found, device=device) if runs else None
    text = shown is not None and shown.ids.dim() == 2
    floor = texts.noise_floor and text and runner is not None and not runner.whole
    return Prepared(source, found, runner, calibration if needy else None, shown, floor)


def _proving(source: Source, proof: Proving) -> bool:
    architecture = (source.config.get("architectures") or [""])[0]
    answers = architecture.endswith(LANGUAGE_MODELS)
    if proof == "logits" and not answers:
        raise UserError(
            f"{source.label} is a {architecture or 'model of unknown class'}, which does not "
            "answer a text with logits over its vocabulary.",
            "Give --proof none, and compare the result in your own way.",
        )
    return proof == "logits" or (proof == "auto" and answers and _readable(source))


def _readable(source: Source) -> bool:
    """Whether text can become tokens of this model."""
    named = any(file.name == "tokenizer.json" for file in source.companions)
    return named or source.config.get("vocab_size") == 256


def _heldout(
    source: Source, text: Text | None, texts: Texts, calibration: Windows | None
) -> Windows:
    length = texts.length
    if texts.heldout is not None:
        return windows(
            source, texts.heldout, samples=texts.heldout_samples, length=length, role="heldout"
        )
    if text is None or str(text) == "builtin" or calibration is None:
        return windows(
            source, "builtin", samples=texts.heldout_samples, length=length, role="heldout"
        )
    used = len(calibration.ids)
    more = windows(source, text, samples=used + texts.heldout_samples, length=length)
    if len(more.ids) == used:
        raise UserError(
            f"the calibration text {more.label} has no window left to compare the result on.",
            "Give --text TEXT to compare on, fewer --samples, or --proof none.",
        )
    label = f"{more.label}, after the calibration windows"
    return Windows(more.ids[used:], label, more.special)


def check(prepared: Prepared, plan: Plan) -> Arrangement:
    """Refuse a plan that would fail later, and lay its output out.

    Raises:
        UserError: See `check_plan`, `check_server`, and the format's own `check`.
    """
    check_plan(plan, prepared.found)
    check_server(plan, prepared.found)
    format = export.get(plan.format, prepared.source, plan.options)
    format.check(plan, prepared.found)
    _check_rounding(plan, format)
    if plan.tune and prepared.runner is not None:
        check_tuning(prepared.runner, plan, prepared.found)
    tensors = _output_tensors(prepared.source, prepared.found, plan, format)
    return format.arrange(tensors)


def _check_rounding(plan: Plan, format: Format) -> None:
    for name, layer in plan.layers.items():
        if layer.rounding and layer.rounding not in format.activations:
            able = [one for one in export.FORMATS if layer.rounding in export.kind(one).activations]
            raise UserError(
                f"{plan.format} has no place for inputs that are rounded to {layer.rounding}, as "
                f"those of {name} are to be.",
                f"Write --format {' or '.join(able)}.",
            )


def check_disk(out: Path, size: int) -> None:
    """Refuse a run that the disk of its output has no room for.

    Raises:
        UserError: There is less free than `size` bytes, what a stopped run holds counted as free.
    """
    place = next(p for p in [out.absolute(), *out.absolute().parents] if p.exists())
    held = sum(file.stat().st_blocks * 512 for file in partial_folder(out).rglob("*"))
    free = shutil.disk_usage(place).free + held
    if free < size:
        raise UserError(
            f"{out} needs {size / 1e9:.3f} GB, but {place} has {free / 1e9:.3f} GB free.",
            "Make room, or put -o on another disk.",
        )


def _output_tensors(
    source: Source, found: Structure, plan: Plan, format: Format
) -> list[TensorInfo]:
    by_tensor = {layer.tensor: layer for layer in found.layers.values()}
    made: list[TensorInfo] = []
    for info in source.tensors.values():
        layer = by_tensor.get(info.name)
        if layer is None or layer.expert is not None or not plan.layers[layer.name].steps:
            made += [] if (stored := format.rest(info)) is None else [stored]
        else:
            made += format.tensors(layer, plan.layers[layer.name], info)
    return made
