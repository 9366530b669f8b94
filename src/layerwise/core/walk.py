"""Calibrated work: one block at a time, its evidence from blocks that are transformed already.

Three activations are carried from block to block: the calibration text through the transformed
model, and the held-out text through both the original and the transformed one, which is the
proof.  They are all that a stopped run needs to go on.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.core import catalogue, memory
from layerwise.core.activations import Activations, filled
from layerwise.core.apply import Transformed, transform
from layerwise.core.checkpoint import Source
from layerwise.core.economy import LAVISH, Economy
from layerwise.core.evidence import Collector, calibrated_words
from layerwise.core.fold import fold
from layerwise.core.format import Format
from layerwise.core.outcome import LayerRow
from layerwise.core.plan import Plan
from layerwise.core.progress import Progress
from layerwise.core.runner import Runner
from layerwise.core.staging import Staging
from layerwise.core.stream import LayerWriter, copy_tensor
from layerwise.core.structure import Layer, Structure, by_input

CALIBRATION, HELDOUT, HELDOUT_BEFORE = "calibration", "heldout", "heldout_before"
# Those that go through the blocks as they were.
_ORIGINAL = {HELDOUT_BEFORE}


@dataclass(frozen=True)
class Walked:
    """What a walk leaves behind.

    Attributes:
        rows: One per layer.
        heldout: Activations of the held-out text after the last transformed block.
        heldout_before: The same through the original blocks.
    """

    rows: list[LayerRow]
    heldout: Activations
    heldout_before: Activations


def walk(
    runner: Runner,
    found: Structure,
    plan: Plan,
    format: Format,
    staging: Staging,
    progress: Progress,
    *,
    calibration: Tensor | None,
    heldout: Tensor,
    economy: Economy = LAVISH,
) -> Walked:
    """Transform a model block by block and write it.

    Args:
        runner: Runs the model.
        found: Its structure.
        plan: What to do.
        format: How to store it.
        staging: Where to write it.
        progress: Is told of each block.
        calibration: Token ids, (windows, length); None if no method reads evidence of it.
        heldout: Token ids, (windows, length), for the proof.
        economy: What to hold on disk, and how much to take up at a time.
    """
    runner = runner.running(economy.tokens)
    source = runner.source
    words = calibrated_words(plan.methods())
    in_block, outside = _by_block(source, found, runner)
    progress.stage("transform", len(runner.blocks))
    started = {HELDOUT: heldout, HELDOUT_BEFORE: heldout}
    if calibration is not None:
        started[CALIBRATION] = calibration
    finished = [block for block in runner.blocks if _step(block) in staging.steps]
    resumed = staging.states() if finished else None
    states: dict[str, Activations] = {}
    if resumed is not None:
        runner.start(heldout[:1])  # one window shows what blocks are called with
        states |= {name: one if economy.on_disk else one[:] for name, one in resumed.items()}
    else:
        for name, ids in started.items():
            parts = runner.starting(ids)
            states[name] = _kept(staging, economy, "start", name, parts, len(ids))
    rows: list[LayerRow] = []
    for block in runner.blocks:
        if block in finished:
            rows += [LayerRow(**row) for row in staging.steps[_step(block)]["facts"]["rows"]]
            progress.step(block)
            continue
        names = in_block[block]
        made = _block(runner, found, plan, format, staging, block, names, words, states, economy)
        rows += made
        staging.finish_step(_step(block), {"rows": [row.as_json() for row in made]}, states)
        memory.settle()
        progress.step(block)
    if "outside" not in staging.steps:
        for name in outside:
            copy_tensor(source, source.tensors[name], format, staging)
        staging.finish_step("outside", {})
    return Walked(rows, states[HELDOUT], states[HELDOUT_BEFORE])


def _block(
    runner: Runner,
    found: Structure,
    plan: Plan,
    format: Format,
    staging: Staging,
    block: str,
    names: Sequence[str],
    words: frozenset[str],
    states: dict[str, Activations],
    economy: Economy,
) -> list[LayerRow]:
    """Transform and write one block, and carry the activations through it.

    What needs the block as it was goes first, so that the block is not held twice.  All that it
    takes is dropped on return, before the next one is read.
    """
    layers = [layer for layer in found.layers.values() if runner.whole or layer.block == block]

    def carry(names: Iterable[str], changed: Mapping[str, Tensor]) -> None:
        for name in names:
            hidden = states[name]
            parts = runner.carry(block, hidden, changed)
            into = hidden if isinstance(hidden, Tensor) else None
            states[name] = _kept(staging, economy, _step(block), name, parts, len(hidden), into)

    seen = _Seen(runner, block, layers, words, states.get(CALIBRATION), economy.input_by_input)
    carry([name for name in states if name in _ORIGINAL], {})
    rows, changed = _transform_block(runner.source, found, plan, layers, seen, format, staging)
    carry([name for name in states if name not in _ORIGINAL], changed)
    _write_rest(runner.source, names, layers, changed, format, staging)
    return rows


def _kept(
    staging: Staging,
    economy: Economy,
    step: str,
    name: str,
    parts: Iterable[Tensor],
    windows: int,
    into: Tensor | None = None,
) -> Activations:
    """Activations as they come out of a step, where they are held between steps."""
    if economy.on_disk:
        return staging.store(step, name, parts, windows)
    return filled(parts, windows, into)


def _step(block: str) -> str:
    return block or "model"


def _by_block(
    source: Source, found: Structure, runner: Runner
) -> tuple[dict[str, list[str]], list[str]]:
    """The tensors of each block, and those of none."""
    inside: dict[str, list[str]] = {block: [] for block in runner.blocks}
    outside: list[str] = []
    for name in source.tensors:
        block = next((b for b in runner.blocks if not b or name.startswith(f"{b}.")), None)
        (outside if block is None else inside[block]).append(name)
    return inside, outside


def gather(
    runner: Runner,
    block: str,
    layers: Sequence[Layer],
    words: frozenset[str],
    hidden: Activations | None,
) -> Mapping[str, Mapping[str, object]]:
    """What calibration shows of every input in a block, by `Layer.reads`."""
    if hidden is None or not words:
        return {}
    first = {reads: group[0] for reads, group in by_input(layers).items()}
    collectors = {layer.name: Collector(layer, words) for layer in first.values()}
    for _ in runner.carry(block, hidden, {}, collectors):
        pass
    return {reads: collectors[layer.name].evidence() for reads, layer in first.items()}


class _Seen:
    """What calibration shows of a block's inputs: of all in one pass, or a pass for each."""

    def __init__(
        self,
        runner: Runner,
        block: str,
        layers: Sequence[Layer],
        words: frozenset[str],
        hidden: Activations | None,
        input_by_input: bool,
    ) -> None:
        self._gather = functools.partial(gather, runner, block, words=words, hidden=hidden)
        self._input_by_input = input_by_input
        self._all = {} if input_by_input else dict(self._gather(layers))
        self._done: set[str] = set()

    def of(self, group: Sequence[Layer]) -> Mapping[str, object]:
        """What these layers read; what others read that came before is dropped."""
        reads = group[0].reads
        if self._input_by_input and reads not in self._all:
            self._all = {}
            self._all = dict(self._gather(group))
        self._all = {
            one: seen for one, seen in self._all.items() if one not in self._done - {reads}
        }
        self._done.add(reads)
        return self._all.get(reads, {})


def _transform_block(
    source: Source,
    found: Structure,
    plan: Plan,
    layers: Sequence[Layer],
    seen: _Seen,
    format: Format,
    staging: Staging,
) -> tuple[list[LayerRow], dict[str, Tensor]]:
    """Transform every layer of a block, and write it.

    Returns:
        A row for each, and the block's new tensors as a loader of the output will see them: those
        of the layers, and the others that scales were folded into.
    """
    rows: list[LayerRow] = []
    folded: dict[str, Tensor] = {}
    changed: dict[str, Tensor] = {}
    by_name = {layer.name: layer for layer in layers}
    for group in together(layers, plan):
        weights = [_weight(source, layer, folded) for layer in group]
        plans = [plan.layers[layer.name] for layer in group]
        done = transform(group, weights, seen.of(group), plans, plan.options)
        del weights
        scale = done[0].input_scale
        while done:
            rows.append(_finish_layer(source, done.pop(0), changed, format, staging))
        if scale is not None:
            feeder = group[0].feeder
            names = [f"{feeder}.{kind}" for kind in ("weight", "bias")]
            tensors = {
                name: folded.get(name, source.read(name).float())
                for name in names
                if name in source.tensors
            }
            folded |= fold(feeder, tensors, scale, norm_offset=found.family.norm_offset)
    for name, value in folded.items():
        if name.endswith(".bias") or _layer_of(name) not in by_name:
            changed[name] = value.to(source.tensors[name].dtype).float()
    return rows, changed


def _finish_layer(
    source: Source,
    result: Transformed,
    changed: dict[str, Tensor],
    format: Format,
    staging: Staging,
) -> LayerRow:
    """Write a transformed layer, and note what a loader will make of it."""
    layer, info = result.layer, source.tensors[result.layer.tensor]
    matrix = format.restored(result, info.dtype)
    if layer.expert is None:
        changed[info.name] = layer.store(matrix, info.shape)
    else:
        whole = changed.setdefault(info.name, torch.empty(info.shape))
        whole[layer.expert] = matrix
    writer = LayerWriter(layer, result.plan, format, staging)
    writer.write(format.encode(result, info))
    writer.finish()
    return LayerRow.of(
        layer,
        result.plan,
        info,
        stored=format.size(layer, result.plan, info),
        error=result.error,
        density=1.0 if result.kept is None else float(result.kept.float().mean()),
        notes=result.notes,
    )


def together(layers: Sequence[Layer], plan: Plan) -> list[list[Layer]]:
    """Layers of a block that are transformed together, in an order that lets scales be folded.

    Those that read one input are: what their methods make of it is made once.  Methods that read
    nothing but weights share nothing.
    """
    by_name = {layer.name: layer for layer in layers}
    made: list[list[Layer]] = []
    for group in _consumers_first(list(by_input(layers).values()), by_name):
        steps = (id for layer in group for id, _ in plan.layers[layer.name].steps)
        methods = [catalogue.get(id) for id in steps]
        shared = calibrated_words(methods) or any(method.rows == "input" for method in methods)
        made += [group] if shared else [[layer] for layer in group]
    return made


def _consumers_first(groups: list[list[Layer]], by_name: Mapping[str, Layer]) -> list[list[Layer]]:
    """Groups in an order in which no layer is transformed before scales are folded into it."""
    feeds = {group[0].feeder for group in groups if group[0].feeder in by_name}
    return sorted(groups, key=lambda group: any(layer.name in feeds for layer in group))


def _layer_of(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _weight(source: Source, layer: Layer, folded: Mapping[str, Tensor]) -> Tensor:
    tensor = folded.get(layer.tensor)
    return (layer.read(source) if tensor is None else layer.matrix(tensor)).float().contiguous()


def _write_rest(
    source: Source,
    names: Sequence[str],
    layers: Sequence[Layer],
    changed: Mapping[str, Tensor],
    format: Format,
    staging: Staging,
) -> None:
    """Write the tensors of a block that are no layers."""
    layered = {layer.tensor for layer in layers}
    for name in names:
        info = source.tensors[name]
        if name in layered:
            continue
        if name in changed:
            stored = format.encode_rest(info, changed[name].to(info.dtype))
            staging.write(format.rest(info).name, stored)
        else:
            copy_tensor(source, info, format, staging)
