"""Calibrated work: one block at a time, its evidence from blocks that are transformed already.

Three activations are carried from block to block: the calibration text through the transformed
model, and the held-out text through both the original and the transformed one, which is the
proof.  They are all that a stopped run needs to go on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.core.apply import Transformed, transform
from layerwise.core.checkpoint import Source
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


@dataclass(frozen=True)
class Walked:
    """What a walk leaves behind.

    Attributes:
        rows: One per layer.
        heldout: Activations of the held-out text after the last transformed block.
        heldout_before: The same through the original blocks.
    """

    rows: list[LayerRow]
    heldout: Tensor
    heldout_before: Tensor


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
    """
    source = runner.source
    words = calibrated_words(plan.methods())
    in_block, outside = _by_block(source, found, runner)
    progress.stage("transform", len(runner.blocks))
    started = {HELDOUT: heldout, HELDOUT_BEFORE: heldout}
    if calibration is not None:
        started[CALIBRATION] = calibration
    finished = [block for block in runner.blocks if _step(block) in staging.steps]
    states = staging.state() if finished else None
    if states is not None:
        runner.start(heldout[:1])  # one window shows what blocks are called with
    else:
        states = {name: runner.start(ids) for name, ids in started.items()}
    rows: list[LayerRow] = []
    for block in runner.blocks:
        if block in finished:
            rows += [LayerRow(**row) for row in staging.steps[_step(block)]["facts"]["rows"]]
            progress.step(block)
            continue
        names = in_block[block]
        made = _block(runner, found, plan, format, staging, block, names, words, states)
        rows += made
        staging.finish_step(_step(block), {"rows": [row.as_json() for row in made]}, states)
        progress.step(block)
    if "outside" not in staging.steps:
        for name in outside:
            copy_tensor(source, source.tensors[name], format, staging)
        staging.finish_step("outside", {}, states)
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
    states: dict[str, Tensor],
) -> list[LayerRow]:
    """Transform and write one block, and carry the activations through it.

    All that a block takes is dropped on return, before the next one is read.
    """
    layers = [layer for layer in found.layers.values() if runner.whole or layer.block == block]
    evidence = gather(runner, block, layers, words, states.get(CALIBRATION))
    done, folded = _transform_block(runner.source, found, plan, layers, evidence)
    changed = _changed(runner.source, format, done, folded)
    for name, hidden in list(states.items()):
        carried = {} if name == HELDOUT_BEFORE else changed
        states[name] = runner.forward(block, hidden, carried)
    return _write_block(runner.source, names, done, folded, format, staging)


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
    hidden: Tensor | None,
) -> Mapping[str, Mapping[str, object]]:
    """What calibration shows of every input in a block, by `Layer.reads`."""
    if hidden is None or not words:
        return {}
    first = {reads: group[0] for reads, group in by_input(layers).items()}
    collectors = {layer.name: Collector(layer, words) for layer in first.values()}
    runner.forward(block, hidden, {}, collectors)
    return {reads: collectors[layer.name].evidence() for reads, layer in first.items()}


def _transform_block(
    source: Source,
    found: Structure,
    plan: Plan,
    layers: Sequence[Layer],
    evidence: Mapping[str, Mapping[str, object]],
) -> tuple[dict[str, Transformed], dict[str, Tensor]]:
    """Every layer of a block, transformed, and the other tensors that scales were folded into."""
    folded: dict[str, Tensor] = {}
    done: dict[str, Transformed] = {}
    by_name = {layer.name: layer for layer in layers}
    for group in _consumers_first(list(by_input(layers).values()), by_name):
        weights = [_weight(source, layer, folded) for layer in group]
        seen = evidence.get(group[0].reads, {})
        plans = [plan.layers[layer.name] for layer in group]
        for result in transform(group, weights, seen, plans, plan.options):
            done[result.layer.name] = result
        scale = done[group[0].name].input_scale
        if scale is not None:
            feeder = group[0].feeder
            names = [f"{feeder}.{kind}" for kind in ("weight", "bias")]
            tensors = {
                name: folded.get(name, source.read(name).float())
                for name in names
                if name in source.tensors
            }
            folded |= fold(feeder, tensors, scale, norm_offset=found.family.norm_offset)
    vectors = {name: value for name, value in folded.items() if _layer_of(name) not in by_name}
    biases = {name: value for name, value in folded.items() if name.endswith(".bias")}
    return done, vectors | biases


def _consumers_first(groups: list[list[Layer]], by_name: Mapping[str, Layer]) -> list[list[Layer]]:
    """Groups in an order in which no layer is transformed before scales are folded into it."""
    feeds = {group[0].feeder for group in groups if group[0].feeder in by_name}
    return sorted(groups, key=lambda group: any(layer.name in feeds for layer in group))


def _layer_of(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _weight(source: Source, layer: Layer, folded: Mapping[str, Tensor]) -> Tensor:
    tensor = folded.get(layer.tensor)
    return (layer.read(source) if tensor is None else layer.matrix(tensor)).float().contiguous()


def _changed(
    source: Source,
    format: Format,
    done: Mapping[str, Transformed],
    folded: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The block's new tensors as a loader of the output will see them."""
    changed: dict[str, Tensor] = {
        name: value.to(source.tensors[name].dtype).float() for name, value in folded.items()
    }
    for result in done.values():
        layer, info = result.layer, source.tensors[result.layer.tensor]
        matrix = format.restored(result, info.dtype)
        if layer.expert is None:
            changed[info.name] = layer.store(matrix, info.shape)
        else:
            whole = changed.setdefault(info.name, torch.empty(info.shape))
            whole[layer.expert] = matrix
    return changed


def _write_block(
    source: Source,
    names: Sequence[str],
    done: Mapping[str, Transformed],
    folded: Mapping[str, Tensor],
    format: Format,
    staging: Staging,
) -> list[LayerRow]:
    rows: list[LayerRow] = []
    layered = {result.layer.tensor for result in done.values()}
    for name in names:
        if name in folded:
            info = source.tensors[name]
            stored = format.encode_rest(info, folded[name].to(info.dtype))
            staging.write(format.rest(info).name, stored)
        elif name not in layered:
            copy_tensor(source, source.tensors[name], format, staging)
    for result in done.values():
        info = source.tensors[result.layer.tensor]
        writer = LayerWriter(result.layer, result.plan, format, staging)
        writer.write(format.encode(result, info))
        writer.finish()
        density = 1.0 if result.kept is None else float(result.kept.float().mean())
        rows.append(
            LayerRow.of(
                result.layer,
                result.plan,
                info,
                stored=format.size(result.layer, result.plan, info),
                error=result.error,
                density=density,
                notes=result.notes,
            )
        )
    return rows
