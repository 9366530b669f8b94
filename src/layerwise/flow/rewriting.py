"""What a model becomes before a plan is made for it: fewer blocks, fewer units, other bases."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from layerwise.core import catalogue
from layerwise.core.errors import UserError
from layerwise.core.plan import check_options
from layerwise.core.progress import Progress, Silent
from layerwise.core.reading.checkpoint import ModuleSource, Source
from layerwise.core.reading.structure import Structure, structure
from layerwise.core.reading.text import windows
from layerwise.core.results import Narrowed
from layerwise.core.rewriting.narrowing import (
    Joint,
    blocks_dropped,
    joints,
    narrowed,
    own_widths,
    shared_widths,
    spendable,
)
from layerwise.core.rewriting.rewriting import Rewriting, original, pair_peaks, rewrite, stream_of
from layerwise.core.running.evidence import calibrated_words
from layerwise.core.running.runner import Runner
from layerwise.core.running.walk import gather
from layerwise.flow.preparing import Texts, calibration_text, device_of, prepare
from layerwise.flow.survey import survey

Options = Mapping[str, Mapping[str, Any]]

# What a batch norm of torchvision's adds to a variance; files do not say it.
_EPSILON = 1e-5


def rewritten(
    source: Source,
    asked: Rewriting,
    texts: Texts,
    *,
    options: Options = MappingProxyType({}),
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Source:
    """A model as it is to be rewritten before anything else is done with it.

    Raises:
        UserError: It cannot be, or a text that this takes is not there.
    """
    device = device_of(device)
    where: Any = {"device": device, "trust_remote_code": trust_remote_code}
    told: Progress = progress or Silent()
    if asked.drop_blocks:
        source = _dropped(source, asked, texts, options, told, where)
    if asked.narrow:
        source = _narrowed(source, asked, texts, options, told, where)
    if not asked.scale_keys:
        return rewrite(source, asked)
    stream = stream_of(source, asked)
    found, runner, hidden = _calibrated(source, "--scale-keys", texts, where)
    keys = [name for name in found.layers if name.endswith(f".{stream.queries[1]}")]
    watching = {name: pair_peaks(source, name) for name in keys}
    for block in runner.blocks:
        inside = {name: one for name, one in watching.items() if name.startswith(f"{block}.")}
        hidden = runner.forward(block, hidden, {}, inside)
    return rewrite(source, asked, {name: one.peaks for name, one in watching.items()})


def _calibrated(
    source: Source, what: str, texts: Texts, where: Mapping[str, Any]
) -> tuple[Structure, Runner, Tensor]:
    """A model's structure, what runs it, and what its first block sees of the calibration text.

    Raises:
        UserError: There is no such text.
    """
    text = calibration_text(source, texts)
    if text is None:
        raise UserError(
            f"{what} learns from what {source.label} sees of a text, and no text was given.",
            "Add --calibration TEXT.",
        )
    found = structure(source)
    shown = windows(source, text, samples=texts.samples, length=texts.length)
    runner = Runner(source, found, **where)
    return found, runner, runner.start(shown.ids)


def _dropped(
    source: Source,
    asked: Rewriting,
    texts: Texts,
    options: Options,
    progress: Progress,
    where: Mapping[str, Any],
) -> Source:
    """The model without the blocks that a measure finds least important."""
    method = catalogue.get(f"measure/{asked.drop_by}")
    if method.unit != "block":
        able = [one.name for one in catalogue.methods("measure") if one.unit == "block"]
        raise UserError(
            f"{method.id} scores layers, and whole blocks are to go.", f"Take {', '.join(able)}."
        )
    check_options(method.id, options.get(method.id, {}))
    if isinstance(original(source), ModuleSource):
        raise UserError(
            f"{source.label} is in memory, and --drop-blocks works on checkpoints.",
            "Save it (model.save_pretrained(DIR)) and give DIR.",
        )
    found = structure(source)
    needing = ["--drop-blocks"]
    prepared = prepare(source, found, [method], texts, needing=needing, proof="none", **where)
    assert prepared.runner is not None
    described: dict[str, Any] = prepared.runner.model.config.to_dict()  # pyright: ignore
    look = survey(prepared, {}, options=options, measures=[method], progress=progress)
    scores = {found.layers[name].block: one for name, one in look.scores[method.name].items()}
    return blocks_dropped(source, found, scores, asked.drop_blocks, described)


def _narrowed(
    source: Source,
    asked: Rewriting,
    texts: Texts,
    options: Options,
    progress: Progress,
    where: Mapping[str, Any],
) -> Source:
    """The model without the units that a method finds least important."""
    method = catalogue.get(f"narrow/{asked.narrow}")
    own = options.get(method.id, {})
    check_options(method.id, own)
    found = structure(source)
    all = joints(source, found)
    budget = spendable(all, found, asked.keep)
    zeroed, notes = asked.widths == "own", list[str]()
    if not zeroed and (settled := [joint for joint in all if joint.seam.settled]):
        zeroed = True
        notes.append(
            f"how many channels {settled[0].reader.name} reads is written in no configuration that "
            "a loader follows: what goes is zeros, and files stay as large"
        )
    seen = _seen(source, found, method, all, texts, progress, where)

    def made(joint: Joint, density: float) -> Narrowed:
        weight = joint.columns(joint.reader.read(source).float())
        given = dict(seen.get(joint.reader.name, {})) | _makers(source, method, joint)
        cut = method.run(**{"weight": weight, **given}, density=density, units=joint.units, **own)
        # Positions of a kernel that read one channel answer together.
        bias = cut.bias.unflatten(0, (joint.reader.rows, -1)).sum(dim=1)
        whole = None if cut.weight is None else joint.whole(cut.weight)
        return Narrowed(cut.kept, cut.scores, bias, whole, cut.notes)

    scores = {joint.reader.name: made(joint, 1.0).scores for joint in all}
    if zeroed:
        widths, said = own_widths(all, scores, budget)
    else:
        widths, said = shared_widths(source, all, scores, budget)
    cuts = {
        joint.reader.name: made(joint, widths[joint.reader.name] / joint.units) for joint in all
    }
    stay = sum(joint.cost * widths[joint.reader.name] for joint in all)
    total = sum(layer.count for layer in found.layers.values())
    went = sum(joint.cost * joint.units for joint in all) - stay
    notes += [
        f"units went by {method.id}: {1 - went / total:.1%} of the weights of layers stay",
        *said,
        *dict.fromkeys(note for cut in cuts.values() for note in cut.notes),
    ]
    told = repr((asked.narrow, asked.keep, asked.widths, sorted(own.items())))
    return narrowed(source, found, all, cuts, zeroed=zeroed, told=told, notes=notes)


def _seen(
    source: Source,
    found: Structure,
    method: catalogue.Method,
    all: Sequence[Joint],
    texts: Texts,
    progress: Progress,
    where: Mapping[str, Any],
) -> Mapping[str, Mapping[str, Any]]:
    """What calibration shows of the channels that readers read, by the reader's name."""
    words = calibrated_words([method])
    if not words:
        return {}
    if shaped := [joint.reader.name for joint in all if joint.reader.layout == "convolution"]:
        raise UserError(
            f"{method.id} goes by what a layer reads, and {shaped[0]} is a convolution, which "
            "reads each channel many times.",
            "Take a method that needs nothing (`layerwise methods narrow`).",
        )
    _, runner, hidden = _calibrated(source, f"--narrow {method.name}", texts, where)
    progress.stage("measure", len(runner.blocks))
    seen: dict[str, Mapping[str, Any]] = {}
    for block in runner.blocks:
        inside = [one.reader for one in all if runner.whole or one.reader.block == block]
        shown = gather(runner, block, inside, words, hidden)
        seen |= {one.name: shown[one.reads] for one in inside}
        hidden = runner.forward(block, hidden, {})
        progress.step(block)
    return seen


def _makers(source: Source, method: catalogue.Method, joint: Joint) -> dict[str, Tensor]:
    """What makes each channel, a batch norm after it counted in, if the method asks for it.

    Raises:
        UserError: Several layers make them.
    """
    if not {"filters", "shifts"}.intersection(method.evidence):
        return {}
    maker, *others = joint.makers
    if others or joint.seam.parts > 1:
        raise UserError(
            f"{method.id} goes by the one layer that makes the channels, and those that "
            f"{joint.reader.name} reads are made by several.",
            "Take another method (`layerwise methods narrow`).",
        )
    filters, bias = maker.read(source).float(), source.tensors.get(f"{maker.name}.bias")
    shifts = torch.zeros(maker.rows) if bias is None else source.read(bias.name).float()
    name = f"{maker.block}.{joint.seam.norm}"
    if joint.seam.norm and f"{name}.running_var" in source.tensors:
        gain, offset, mean, variance = (
            source.read(f"{name}.{part}").float()
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        factor = gain / (variance + _EPSILON).sqrt()  # (channels,)
        filters, shifts = filters * factor[:, None], offset + factor * (shifts - mean)
    return {"filters": filters, "shifts": shifts}
