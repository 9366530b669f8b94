"""Calibrated work: one block at a time, its evidence from blocks that are transformed already.

Up to four activations are carried from block to block: the calibration text through the
transformed model, and the held-out text through the transformed one, the original, and the original
in bfloat16, which are the proof.  They are all that a stopped run needs to go on.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.core.apply import Transformed, transform
from layerwise.core.candidates import Candidates, Losses
from layerwise.core.checkpoint import Source
from layerwise.core.evidence import Collector, calibrated_words
from layerwise.core.fold import fold
from layerwise.core.format import Format
from layerwise.core.outcome import LayerRow
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.progress import Progress
from layerwise.core.runner import Runner
from layerwise.core.staging import Staging
from layerwise.core.stream import copy_tensor, write_layer
from layerwise.core.structure import Layer, Structure, by_input

CALIBRATION, HELDOUT, HELDOUT_BEFORE = "calibration", "heldout", "heldout_before"
HELDOUT_FLOOR = "heldout_floor"
# What most models are trained and served in: what it changes is noise that nobody minds.
FLOOR_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Walked:
    """What a walk leaves behind.

    Attributes:
        rows: One per layer.
        heldout: Activations of the held-out text after the last transformed block.
        heldout_before: The same through the original blocks.
        heldout_floor: The same through the original blocks in bfloat16; None if not asked for.
    """

    rows: list[LayerRow]
    heldout: Tensor
    heldout_before: Tensor
    heldout_floor: Tensor | None


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
    noise_floor: bool = False,
    candidates: Candidates | None = None,
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
        noise_floor: Carry the held-out text through the original in bfloat16 too.
        candidates: Has layers that were made before, if the plan is of what they see in the
            original model; takes those that are made now.
    """
    source = runner.source
    words = calibrated_words(plan.methods())
    in_block, outside = _by_block(runner)
    progress.stage("transform", len(runner.blocks))
    started = {HELDOUT: heldout}
    original = None
    if plan.inputs == "original":
        original = _Original(runner, calibration)
    elif calibration is not None:
        started[CALIBRATION] = calibration
    finished = [block for block in runner.blocks if _step(block) in staging.steps]
    states = staging.state() if finished else None
    if states is not None:
        runner.start(heldout[:1])  # one window shows what blocks are called with
        if noise_floor:
            runner.start(heldout[:1], FLOOR_DTYPE)
    else:
        around = restored_outside(runner, format)
        states = {name: runner.start(ids, changed=around) for name, ids in started.items()}
        states[HELDOUT_BEFORE] = runner.start(heldout) if around else states[HELDOUT]
        if noise_floor:
            states[HELDOUT_FLOOR] = runner.start(heldout, FLOOR_DTYPE)
    rows: list[LayerRow] = []
    for block in runner.blocks:
        if block in finished:
            rows += [
                LayerRow.from_json(row) for row in staging.steps[_step(block)]["facts"]["rows"]
            ]
            progress.step(block)
            continue
        names = in_block[block]
        layers = [one for one in found.layers.values() if runner.whole or one.block == block]
        seen = functools.cache(
            functools.partial(_evidence, runner, block, layers, words, states, original)
        )
        kept = candidates if original else None
        transformed = _transform_block(source, found, plan, layers, seen, kept)
        made = _carry_and_write(runner, format, staging, block, names, transformed, states)
        del transformed, seen  # before the next block is read
        rows += made
        staging.finish_step(_step(block), {"rows": [row.as_json() for row in made]}, states)
        progress.step(block)
    if "outside" not in staging.steps:
        for name in outside:
            copy_tensor(source, source.tensors[name], format, staging)
        staging.finish_step("outside", {}, states)
    return Walked(rows, states[HELDOUT], states[HELDOUT_BEFORE], states.get(HELDOUT_FLOOR))


@dataclass
class _Original:
    """The calibration text on its way through the original model, carried as far as is needed."""

    runner: Runner
    ids: Tensor | None
    hidden: Tensor | None = None
    at: int = 0

    def before(self, block: str) -> Tensor | None:
        """What a block sees; blocks are asked for in order."""
        if self.ids is None:
            return None
        if self.hidden is None:
            self.hidden = self.runner.start(self.ids)
        for earlier in self.runner.blocks[self.at : self.runner.blocks.index(block)]:
            self.hidden = self.runner.forward(earlier, self.hidden, {})
            self.at += 1
        return self.hidden


Evidence = Mapping[str, Mapping[str, object]]


def _evidence(
    runner: Runner,
    block: str,
    layers: Sequence[Layer],
    words: frozenset[str],
    states: Mapping[str, Tensor],
    original: _Original | None,
) -> Evidence:
    """What calibration shows of a block's inputs."""
    hidden = states.get(CALIBRATION) if original is None else original.before(block)
    return gather(runner, block, layers, words, hidden)


def _carry_and_write(
    runner: Runner,
    format: Format,
    staging: Staging,
    block: str,
    names: Sequence[str],
    transformed: tuple[Mapping[str, Transformed], Mapping[str, Tensor]],
    states: dict[str, Tensor],
) -> list[LayerRow]:
    """Carry the activations through a transformed block, and write it."""
    done, folded = transformed
    carried_over = _carried_over(runner.source, done, folded)
    layered = {result.layer.tensor for result in done.values()}
    untouched = [name for name in names if name not in layered and name not in carried_over]
    changed = _restored_rest(runner.source, format, untouched)
    changed |= _changed(runner.source, format, done, carried_over)
    for name, hidden in list(states.items()):
        carried = {} if name in (HELDOUT_BEFORE, HELDOUT_FLOOR) else changed
        states[name] = runner.forward(block, hidden, carried)
    return _write_block(runner.source, untouched, done, carried_over, format, staging)


def _step(block: str) -> str:
    return block or "model"


def restored_outside(runner: Runner, format: Format) -> dict[str, Tensor]:
    """The tensors of no block that a loader of the output will see otherwise than they are."""
    source = runner.source
    return _restored_rest(source, format, _by_block(runner)[1])


def _restored_rest(source: Source, format: Format, names: Iterable[str]) -> dict[str, Tensor]:
    """What a loader holds of tensors no plan touches, unless they are stored as they are."""
    infos = [source.tensors[name] for name in names]
    return {
        info.name: format.restored_rest(info, source.read(info.name))
        for info in infos
        if format.rest(info) != info
    }


def _by_block(runner: Runner) -> tuple[dict[str, list[str]], list[str]]:
    """The tensors of each block, and those of none."""
    source = runner.source
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
    seen: Callable[[], Evidence],
    candidates: Candidates | None,
) -> tuple[dict[str, Transformed], dict[str, Tensor]]:
    """Every layer of a block, transformed, and the other tensors that scales were folded into."""
    folded: dict[str, Tensor] = {}
    done: dict[str, Transformed] = {}
    by_name = {layer.name: layer for layer in layers}
    for group in _consumers_first(list(by_input(layers).values()), by_name):
        for result in _transform_group(source, plan, group, folded, seen, candidates):
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


def _transform_group(
    source: Source,
    plan: Plan,
    group: Sequence[Layer],
    folded: Mapping[str, Tensor],
    seen: Callable[[], Evidence],
    candidates: Candidates | None,
) -> list[Transformed]:
    """Layers that read one input, made before or now."""
    plans = [plan.layers[layer.name] for layer in group]
    # What scales were folded into is another weight than the one candidates are made of.
    kept = None if any(layer.tensor in folded for layer in group) else candidates
    if kept is not None:
        found = [
            kept.find(layer, one, plan.options) if one.steps else _left(source, layer, one)
            for layer, one in zip(group, plans, strict=True)
        ]
        known = [one for one in found if one is not None]
        if len(known) == len(group):
            return known
    weights = [_weight(source, layer, folded) for layer in group]
    evidence = seen().get(group[0].reads, {}) if any(one.steps for one in plans) else {}
    made = transform(group, weights, evidence, plans, plan.options)
    for result in made:
        if kept is not None and result.plan.steps:
            kept.keep(result, plan.options)
            kept.keep_losses(result.layer, Losses.of(result), plan.options)
    return made


def _left(source: Source, layer: Layer, plan: LayerPlan) -> Transformed:
    """A layer that its plan leaves as it is."""
    return transform([layer], [_weight(source, layer, {})], {}, [plan], {})[0]


def _consumers_first(groups: list[list[Layer]], by_name: Mapping[str, Layer]) -> list[list[Layer]]:
    """Groups in an order in which no layer is transformed before scales are folded into it."""
    feeds = {group[0].feeder for group in groups if group[0].feeder in by_name}
    return sorted(groups, key=lambda group: any(layer.name in feeds for layer in group))


def _layer_of(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _weight(source: Source, layer: Layer, folded: Mapping[str, Tensor]) -> Tensor:
    tensor = folded.get(layer.tensor)
    tensor = source.read(layer.tensor) if tensor is None else tensor
    return layer.matrix(tensor).to(torch.float32, copy=True).contiguous()


def _changed(
    source: Source,
    format: Format,
    done: Mapping[str, Transformed],
    carried_over: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The block's new tensors as a loader of the output will see them."""
    changed = {
        name: format.restored_rest(source.tensors[name], value).float()
        for name, value in carried_over.items()
    }
    for result in done.values():
        layer, info = result.layer, source.tensors[result.layer.tensor]
        if info.name in carried_over:
            continue
        matrix = format.restored(result, info.dtype)
        if layer.expert is None:
            changed[info.name] = layer.store(matrix, info.shape)
        else:
            whole = changed.setdefault(info.name, torch.empty(info.shape))
            whole[layer.expert] = matrix
    return changed


def _carried_over(
    source: Source, done: Mapping[str, Transformed], folded: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors that stay what they were, in the checkpoint's dtype, with what was folded into them.

    The weights of layers that no step was done to are among them.
    """
    values = dict(folded)
    for result in done.values():
        layer = result.layer
        if not result.plan.steps and layer.expert is None:
            values[layer.tensor] = layer.store(result.weight, source.tensors[layer.tensor].shape)
    return {name: value.to(source.tensors[name].dtype) for name, value in values.items()}


def _write_block(
    source: Source,
    untouched: Sequence[str],
    done: Mapping[str, Transformed],
    carried_over: Mapping[str, Tensor],
    format: Format,
    staging: Staging,
) -> list[LayerRow]:
    rows: list[LayerRow] = []
    for name in untouched:
        copy_tensor(source, source.tensors[name], format, staging)
    for name, value in carried_over.items():
        info = source.tensors[name]
        if (stored := format.rest(info)) is not None:
            staging.write(stored.name, format.encode_rest(info, value))
    for result in done.values():
        info = source.tensors[result.layer.tensor]
        if info.name not in carried_over:
            write_layer(result.layer, result.plan, [format.encode(result, info)], format, staging)
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
