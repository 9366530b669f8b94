"""Calibrated work: one block at a time, its evidence from blocks that are transformed already.

Up to four activations are carried from block to block: the calibration text through the
transformed model, and the held-out text through the transformed one, the original, and the original
in bfloat16, which are the proof.  They are all that a stopped run needs to go on.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from layerwise.core import catalogue, memory
from layerwise.core.economy import LAVISH, Economy
from layerwise.core.format import Format
from layerwise.core.keeping.candidates import Candidates, Losses, Options
from layerwise.core.keeping.staging import Staging
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.progress import Progress
from layerwise.core.reading.checkpoint import Source
from layerwise.core.reading.structure import Layer, Structure, by_input
from layerwise.core.rewriting.fold import fold
from layerwise.core.running.apply import Transformed, transform
from layerwise.core.running.carried import Activations, Shelf, Stored, filled
from layerwise.core.running.evidence import (
    BY_LAYER,
    GRAD,
    SLOPES,
    AttentionCollector,
    Collector,
    calibrated_words,
)
from layerwise.core.running.fisher import WeightGradients
from layerwise.core.running.joint import learned_together
from layerwise.core.running.products import Answer
from layerwise.core.running.recovery import recovered, recovers
from layerwise.core.running.runner import Runner
from layerwise.core.running.slopes import WeightSlopes
from layerwise.core.running.stream import LayerWriter, copy_tensor
from layerwise.core.running.tuning import (
    Tuned,
    bias_of,
    input_means,
    learned_biases,
    norm_statistics,
)
from layerwise.core.telling.outcome import LayerRow

CALIBRATION, HELDOUT, HELDOUT_BEFORE = "calibration", "heldout", "heldout_before"
HELDOUT_FLOOR = "heldout_floor"
# What most models are trained and served in: what it changes is noise that nobody minds.
FLOOR_DTYPE = torch.bfloat16
# Those that go through the blocks as they were.
_ORIGINAL = {HELDOUT_BEFORE, HELDOUT_FLOOR}


@dataclass(frozen=True)
class Walked:
    """What a walk leaves behind.

    Attributes:
        rows: One per layer.
        heldout: Activations of the held-out text after the last transformed block.
        heldout_before: The same through the original blocks.
        heldout_floor: The same through the original blocks in bfloat16; None if not asked for.
        tuned: What was tuned, block by block.
    """

    rows: list[LayerRow]
    heldout: Activations
    heldout_before: Activations
    heldout_floor: Activations | None
    tuned: list[Tuned]


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
        noise_floor: Carry the held-out text through the original in bfloat16 too.
        candidates: Has layers that were made before, if the plan is of what they see in the
            original model; takes those that are made now.
        economy: What to hold on disk, and how much to take up at a time.
    """
    runner = runner.running(economy.tokens)
    source = runner.source
    words = plan.words()
    in_block, outside = by_block(runner)
    progress.stage("transform", len(runner.blocks))
    held = _Held(staging, economy)
    original = None
    if plan.inputs == "original" or any(layer.joint for layer in plan.layers.values()):
        original = _Original(runner, held, calibration)
    gradients = held.gradients(runner, calibration if GRAD in words else None)
    finished = [block for block in runner.blocks if _step(block) in staging.steps]
    resumed = staging.states() if finished else None
    states: dict[str, Activations] = {}
    if resumed is not None:
        for dtype in (torch.float32, *([FLOOR_DTYPE] if noise_floor else [])):
            for one in (runner, runner.original):
                one.start(heldout[:1], dtype)  # one window shows what blocks are called with
        states |= {name: one if economy.on_disk else one[:] for name, one in resumed.items()}
    else:
        walking = None if plan.inputs == "original" else calibration
        states |= _started(runner, format, held, heldout, walking, noise_floor=noise_floor)
    rows: list[LayerRow] = []
    tuned: list[Tuned] = []
    for block in runner.blocks:
        if block in finished:
            facts = staging.steps[_step(block)]["facts"]
            rows += [LayerRow.from_json(row) for row in facts["rows"]]
            tuned.append(Tuned.from_json(facts["tuned"]))
            progress.step(block)
            continue
        layers = [one for one in found.layers.values() if runner.whole or one.block == block]
        work = _Block(runner, found, plan, format, staging, held, block, layers, states, gradients)
        kept = candidates if plan.inputs == "original" else None
        made = work.done(in_block[block], words, original, kept)
        tuned.append(work.tuned)
        facts = {"rows": [row.as_json() for row in made], "tuned": work.tuned.as_json()}
        del work  # before the next block is read
        rows += made
        staging.finish_step(_step(block), facts, states)
        memory.settle()
        progress.step(block)
    _drop(original, gradients)
    if "outside" not in staging.steps:
        for name in outside:
            copy_tensor(source, source.tensors[name], format, staging)
        staging.finish_step("outside", {})
    floor = states.get(HELDOUT_FLOOR)
    return Walked(rows, states[HELDOUT], states[HELDOUT_BEFORE], floor, tuned)


def _started(
    runner: Runner,
    format: Format,
    held: "_Held",
    heldout: Tensor,
    calibration: Tensor | None,
    *,
    noise_floor: bool,
) -> dict[str, Activations]:
    """What the first block sees of all that is carried."""
    around = restored_outside(runner, format)
    begun = {
        HELDOUT: (heldout, torch.float32, around),
        HELDOUT_BEFORE: (heldout, torch.float32, None),
    }
    if noise_floor:
        begun[HELDOUT_FLOOR] = (heldout, FLOOR_DTYPE, None)
    if calibration is not None:
        begun[CALIBRATION] = (calibration, torch.float32, around)
    return {
        name: held.keep("start", name, _runs(runner, name).starting(ids, dtype, changed), len(ids))
        for name, (ids, dtype, changed) in begun.items()
    }


def _runs(runner: Runner, name: str) -> Runner:
    """What carries activations: those of the original, the model as it was before rewriting."""
    return runner.original if name in _ORIGINAL else runner


@dataclass(frozen=True)
class _Held:
    """Where activations are held between steps."""

    staging: Staging
    economy: Economy

    def keep(
        self,
        step: str,
        name: str,
        parts: Iterable[Tensor],
        windows: int,
        into: Activations | None = None,
        *,
        aside: bool = False,
    ) -> Activations:
        """Activations as they come out of a step; `into` is what may be overwritten."""
        if self.economy.on_disk:
            return self.staging.store(step, name, parts, windows, aside=aside)
        return filled(parts, windows, into if isinstance(into, Tensor) else None)

    def gradients(self, runner: Runner, calibration: Tensor | None) -> WeightGradients | None:
        """Gradients of weights on some text; None without one."""
        if calibration is None:
            return None
        folder = self.staging.folder / GRAD if self.economy.on_disk else None
        return WeightGradients(runner, calibration, Shelf(folder))


@dataclass
class _Original:
    """The calibration text on its way through the original model, carried as far as is needed."""

    runner: Runner
    held: _Held
    ids: Tensor | None
    hidden: Activations | None = None
    at: int = 0

    def before(self, block: str) -> Activations | None:
        """What a block sees; blocks are asked for in order."""
        if self.ids is None:
            return None
        if self.hidden is None:
            self._keep("start", self.runner.starting(self.ids))
        for earlier in self.runner.blocks[self.at : self.runner.blocks.index(block)]:
            assert self.hidden is not None
            self._keep(_step(earlier), self.runner.carry(earlier, self.hidden, {}))
            self.at += 1
        return self.hidden

    def _keep(self, step: str, parts: Iterable[Tensor]) -> None:
        assert self.ids is not None
        made = self.held.keep(step, CALIBRATION, parts, len(self.ids), self.hidden, aside=True)
        self.drop()
        self.hidden = made

    def drop(self) -> None:
        """Let go of what lies on disk."""
        if isinstance(self.hidden, Stored):
            self.hidden.path.unlink(missing_ok=True)


@dataclass
class _Block:
    """One block's work: it is transformed and written, and activations are carried through it.

    What needs the block as it was goes first, and each group of layers is written when it is done,
    so that the block is not held twice.  All that it takes is dropped with it.
    """

    runner: Runner
    found: Structure
    plan: Plan
    format: Format
    staging: Staging
    held: _Held
    block: str
    layers: Sequence[Layer]
    states: dict[str, Activations]
    gradients: WeightGradients | None = None
    tuned: Tuned = field(default_factory=Tuned)

    def done(
        self,
        names: Sequence[str],
        words: frozenset[str],
        original: _Original | None,
        candidates: Candidates | None,
    ) -> list[LayerRow]:
        """Do it; `names` are all tensors of the block."""

        def hidden() -> Activations | None:
            if self.plan.inputs == "original" and original is not None:
                return original.before(self.block)
            return self.states.get(CALIBRATION)

        by_itself = self.held.economy.input_by_input
        seen = Seen(self.runner, self.block, self.layers, words, hidden, by_itself, self.gradients)
        self._carry([name for name in self.states if name in _ORIGINAL], {})
        changed: dict[str, Tensor] = {}
        answers: dict[str, Answer] = {}
        carried = hidden() if self.plan.tune else None
        means: Mapping[str, Tensor] = {}
        if carried is not None and "bias" in self.plan.tune and not self.runner.whole:
            means = input_means(self.runner, self.block, self.layers, carried)
        waiting: list[Transformed] = []
        rows, rest = self._transform(seen, original, candidates, changed, answers, means, waiting)
        if waiting and (shown := hidden()) is not None:
            waiting, vectors = self._recover(waiting, shown, {**changed, **rest})
            rest |= vectors
        rows += [self._finish_layer(result, changed, answers) for result in waiting]
        source = self.runner.source
        outside = _restored_rest(source, self.format, [n for n in names if n not in changed])
        if carried is not None:
            self._tune(carried, {**outside, **changed}, rest, answers)
        for name, value in rest.items():
            self._write_rest(name, value, changed)
        untouched = [name for name in names if name not in changed]
        changed |= {name: outside[name] for name in untouched if name in outside}
        self._carry([name for name in self.states if name not in _ORIGINAL], changed, answers)
        for name in untouched:
            copy_tensor(source, source.tensors[name], self.format, self.staging)
        return rows

    def _carry(
        self,
        names: Iterable[str],
        changed: Mapping[str, Tensor],
        answers: Mapping[str, Answer] | None = None,
    ) -> None:
        for name in names:
            runner, blocks = self.runner, [self.block]
            if name in _ORIGINAL:
                runner, blocks = runner.original, runner.originals(self.block)
            for block in blocks:
                hidden = self.states[name]
                parts = runner.carry(block, hidden, changed, answers=answers)
                step = _step(block)
                self.states[name] = self.held.keep(step, name, parts, len(hidden), hidden)

    def _transform(
        self,
        seen: "Seen",
        original: _Original | None,
        candidates: Candidates | None,
        changed: dict[str, Tensor],
        answers: dict[str, Answer],
        means: Mapping[str, Tensor],
        waiting: list[Transformed],
    ) -> tuple[list[LayerRow], dict[str, Tensor]]:
        """Transform every layer and write it, and give what other tensors are to become.

        Layers that are to be learned anew are put into `waiting` instead.  What a loader of the
        output will make of the layers is put into `changed`; what layers answer whose inputs are
        rounded, into `answers`.  `means` are of inputs whose layers are to keep the mean of their
        answer.
        """
        source = self.runner.source
        rows: list[LayerRow] = []
        folded: dict[str, Tensor] = {}
        by_name = {layer.name: layer for layer in self.layers}
        for group in together(self.layers, self.plan, whole=self.runner.whole):
            if joint(self.plan, group[0], whole=self.runner.whole):
                assert original is not None
                done = self._learned(group, folded, seen, original, candidates, changed)
            else:
                done = _transform_group(source, self.plan, group, folded, seen, candidates)
            scale = done[0].input_scale
            for result in done:
                folded |= self._corrected(result, folded, means)
            while done:
                result = done.pop(0)
                if recovers(self.plan, result):
                    info = source.tensors[result.layer.tensor]
                    changed[info.name] = result.layer.store(result.weight, info.shape)
                    waiting.append(result)
                else:
                    rows.append(self._finish_layer(result, changed, answers))
            if scale is not None:
                feeder = group[0].feeder
                names = [f"{feeder}.{kind}" for kind in ("weight", "bias")]
                tensors = {
                    name: folded.get(name, source.read(name).float())
                    for name in names
                    if name in source.tensors
                }
                offset = self.found.family.norm_offset
                folded |= fold(feeder, tensors, scale, norm_offset=offset)
        rest = {
            name: value
            for name, value in folded.items()
            if name.endswith(".bias") or _layer_of(name) not in by_name
        }
        return rows, rest

    def _corrected(
        self, result: Transformed, folded: Mapping[str, Tensor], means: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """A layer's bias with what the layer lost of its mean answer."""
        layer, source = result.layer, self.runner.source
        name, mean = bias_of(self.runner, layer), means.get(layer.reads)
        if not name or mean is None or not result.plan.steps:
            return {}
        bias = folded[name] if name in folded else source.read(name).float()
        self.tuned = replace(self.tuned, biases=self.tuned.biases + 1)
        return {name: bias + (_weight(source, layer, folded) - result.weight) @ mean}

    def _tune(
        self,
        hidden: Activations,
        changed: dict[str, Tensor],
        rest: dict[str, Tensor],
        answers: Mapping[str, Answer],
    ) -> None:
        """Put what is tuned into `rest`; `changed` is all that the block has become so far."""
        changed |= rest
        if "norms" in self.plan.tune:
            found = norm_statistics(self.runner, self.block, hidden, changed, answers)
            rest |= found
            changed |= found
            self.tuned = replace(self.tuned, norms=len(found) // 2)
        if "bias" in self.plan.tune and self.runner.whole:
            targets = self.runner.original.forward(self.block, hidden[:], {})
            biases, kl = learned_biases(self.runner, hidden[:], targets, changed)
            rest |= biases
            self.tuned = replace(self.tuned, biases=len(biases), kl=kl)

    def _recover(
        self, waiting: Sequence[Transformed], hidden: Activations, changed: Mapping[str, Tensor]
    ) -> tuple[list[Transformed], dict[str, Tensor]]:
        """Pruned layers learned anew, with the vectors that were learned beside them."""
        inputs = hidden[:]
        done, vectors, error = recovered(
            self.runner,
            self.block,
            waiting,
            catalogue.get(f"recover/{self.plan.recover}"),
            self.plan.options,
            inputs=inputs,
            targets=self.runner.forward(self.block, inputs, {}),
            changed=changed,
        )
        self.tuned = replace(self.tuned, recovered=len(done), error=error)
        return done, vectors

    def _learned(
        self,
        group: Sequence[Layer],
        folded: Mapping[str, Tensor],
        seen: "Seen",
        original: _Original,
        candidates: Candidates | None,
        changed: Mapping[str, Tensor],
    ) -> list[Transformed]:
        """Layers of the block whose codes are learned together, made before or now."""
        plans = [self.plan.layers[layer.name] for layer in group]
        # Candidates of one level are learned beside others of it.
        alike = len({plan.work for plan in plans}) == 1
        kept = candidates if alike and not folded else None
        if (known := _found(kept, group, plans, self.plan.options, self.runner.source)) is not None:
            return known
        source = self.runner.source
        shown = {reads: seen.of(members) for reads, members in by_input(group).items()}
        evidence = [shown[layer.reads] for layer in group]
        weights = [_weight(source, layer, folded) for layer in group]
        inputs, before = seen.carried(), original.before(self.block)
        assert inputs is not None
        assert before is not None
        coded = learned_together(
            self.runner,
            self.block,
            group,
            weights,
            evidence,
            plans,
            self.plan.options,
            inputs=inputs[:],
            targets=self.runner.forward(self.block, before[:], {}),
            changed={**folded, **changed},
        )
        made = [
            transform([layer], [weight], given, [plan], self.plan.options, coded=coded)[0]
            for layer, weight, given, plan in zip(group, weights, evidence, plans, strict=True)
        ]
        _keep(kept, made, self.plan.options)
        return made

    def _finish_layer(
        self, result: Transformed, changed: dict[str, Tensor], answers: dict[str, Answer]
    ) -> LayerRow:
        """Write a transformed layer, and note what a loader will make of it."""
        layer, format = result.layer, self.format
        info = self.runner.source.tensors[layer.tensor]
        if (answer := format.answer(result, info.dtype)) is not None:
            answers[layer.name] = answer
        if not result.plan.steps and layer.expert is None:
            self._write_rest(info.name, layer.store(result.weight, info.shape), changed)
        else:
            matrix = format.restored(result, info.dtype)
            if layer.expert is None:
                changed[info.name] = layer.store(matrix, info.shape)
            else:
                whole = changed.setdefault(info.name, torch.empty(info.shape))
                whole[layer.expert] = matrix
            writer = LayerWriter(layer, result.plan, format, self.staging)
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

    def _write_rest(self, name: str, value: Tensor, changed: dict[str, Tensor]) -> None:
        """Write a tensor that stays what it was, with what was folded into it."""
        info, format = self.runner.source.tensors[name], self.format
        value = value.to(info.dtype)
        changed[name] = format.restored_rest(info, value).float()
        if (stored := format.rest(info)) is not None:
            self.staging.write(stored.name, format.encode_rest(info, value))


def _drop(*passes: _Original | WeightGradients | None) -> None:
    """Let go of what lies on disk for nobody but the walk."""
    for one in passes:
        if one is not None:
            one.drop()


def _step(block: str) -> str:
    return block or "model"


def restored_outside(runner: Runner, format: Format) -> dict[str, Tensor]:
    """The tensors of no block that a loader of the output will see otherwise than they are."""
    source = runner.source
    return _restored_rest(source, format, by_block(runner)[1])


def _restored_rest(source: Source, format: Format, names: Iterable[str]) -> dict[str, Tensor]:
    """What a loader holds of tensors no plan touches, unless they are stored as they are."""
    infos = [source.tensors[name] for name in names]
    return {
        info.name: format.restored_rest(info, source.read(info.name))
        for info in infos
        if format.rest(info) != info
    }


def by_block(runner: Runner) -> tuple[dict[str, list[str]], list[str]]:
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
    hidden: Activations | None,
) -> Mapping[str, Mapping[str, object]]:
    """What calibration shows of every input in a block, by `Layer.reads`."""
    if hidden is None or not words - BY_LAYER:
        return {}
    first = {reads: group[0] for reads, group in by_input(layers).items()}
    collectors = {layer.name: Collector(layer, words) for layer in first.values()}
    attention = AttentionCollector() if "attention" in words else None
    for _ in runner.carry(block, hidden, {}, collectors, attention=attention):
        pass
    shared = {} if attention is None else attention.evidence()
    return {reads: {**collectors[one.name].evidence(), **shared} for reads, one in first.items()}


@dataclass
class Seen:
    """What calibration shows of a block's inputs: of all in one pass, or a pass for each.

    Where methods read them, the gradients of its layers' weights, and slopes of the loss along
    random directions, are among it, by layer.

    Nothing is run before something is asked for.
    """

    runner: Runner
    block: str
    layers: Sequence[Layer]
    words: frozenset[str]
    hidden: Activations | Callable[[], Activations | None]
    input_by_input: bool
    gradients: WeightGradients | None = None
    slopes: WeightSlopes | None = None
    all: dict[str, Mapping[str, object]] | None = None
    last: str = ""

    def of(self, group: Sequence[Layer]) -> Mapping[str, object]:
        """What these layers read; it is dropped when others are asked for."""
        reads = group[0].reads
        if self.all is not None and reads != self.last:
            self.all.pop(self.last, None)
        if self.all is None or (self.input_by_input and reads != self.last):
            self.all = None  # before more is gathered
            alike = [layer for layer in self.layers if layer.reads == reads]
            self.all = dict(self._gather(alike if self.input_by_input else self.layers))
        self.last = reads
        return self.all.get(reads, {})

    def carried(self) -> Activations | None:
        """What the block itself sees of the calibration text."""
        return self.hidden() if callable(self.hidden) else self.hidden

    def _gather(self, layers: Sequence[Layer]) -> Mapping[str, Mapping[str, object]]:
        hidden = self.carried()
        made = gather(self.runner, self.block, layers, self.words, hidden)
        found: dict[str, Mapping[str, Tensor]] = {}
        if self.gradients is not None:
            found[GRAD] = self.gradients.of(self.block, layers)
        if self.slopes is not None and hidden is not None:
            found[SLOPES] = self.slopes.of(self.block, layers, hidden)
        if not found:
            return made
        return {
            reads: {**made.get(reads, {}), **{w: _of(group, found[w]) for w in found}}
            for reads, group in by_input(layers).items()
        }


def _of(group: Sequence[Layer], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {layer.name: found[layer.name] for layer in group}


def _transform_group(
    source: Source,
    plan: Plan,
    group: Sequence[Layer],
    folded: Mapping[str, Tensor],
    seen: Seen,
    candidates: Candidates | None,
) -> list[Transformed]:
    """Layers that read one input, made before or now."""
    plans = [plan.layers[layer.name] for layer in group]
    # What scales were folded into is another weight than the one candidates are made of.
    kept = None if any(layer.tensor in folded for layer in group) else candidates
    if (known := _found(kept, group, plans, plan.options, source)) is not None:
        return known
    evidence = seen.of(group) if any(one.steps for one in plans) else {}
    weights = [_weight(source, layer, folded) for layer in group]
    made = transform(group, weights, evidence, plans, plan.options)
    _keep(kept, made, plan.options)
    return made


def _found(
    kept: Candidates | None,
    group: Sequence[Layer],
    plans: Sequence[LayerPlan],
    options: Options,
    source: Source,
) -> list[Transformed] | None:
    """All of some layers, if all of them were made before."""
    if kept is None:
        return None
    found = [
        kept.find(layer, plan, options) if plan.steps else _left(source, layer, plan)
        for layer, plan in zip(group, plans, strict=True)
    ]
    known = [one for one in found if one is not None]
    return known if len(known) == len(group) else None


def _keep(kept: Candidates | None, made: Sequence[Transformed], options: Options) -> None:
    for result in made:
        if kept is not None and result.plan.steps:
            kept.keep(result, options)
            kept.keep_losses(result.layer, Losses.of(result), options)


def _left(source: Source, layer: Layer, plan: LayerPlan) -> Transformed:
    """A layer that its plan leaves as it is."""
    return transform([layer], [_weight(source, layer, {})], {}, [plan], {})[0]


def joint(plan: Plan, layer: Layer, *, whole: bool) -> bool:
    """Whether a layer's codes are learned with those of its whole block."""
    return plan.layers[layer.name].joint and not alone(layer, whole=whole)


def alone(layer: Layer, *, whole: bool) -> bool:
    """Whether a layer's codes are learned by themselves, whatever the method.

    So it is where the model runs as a `whole`, and if it is an expert: its matrix is a part of a
    tensor, and few tokens see it.
    """
    return whole or layer.expert is not None or "experts." in layer.name


def together(layers: Sequence[Layer], plan: Plan, *, whole: bool) -> list[list[Layer]]:
    """Layers of a block that are transformed together, in an order that lets scales be folded.

    Those that read one input are: what their methods make of it is made once.  Methods that read
    nothing but weights share nothing.  Those whose codes are learned together come last.
    """
    learned = [layer for layer in layers if joint(plan, layer, whole=whole)]
    layers = [layer for layer in layers if layer not in learned]
    by_name = {layer.name: layer for layer in layers}
    made: list[list[Layer]] = []
    for group in _consumers_first(list(by_input(layers).values()), by_name):
        steps = (id for layer in group for id, _ in plan.layers[layer.name].steps)
        methods = [catalogue.get(id) for id in steps]
        shared = calibrated_words(methods) or any(method.rows == "input" for method in methods)
        made += [group] if shared else [[layer] for layer in group]
    return [*made, learned] if learned else made


def _consumers_first(groups: list[list[Layer]], by_name: Mapping[str, Layer]) -> list[list[Layer]]:
    """Groups in an order in which no layer is transformed before scales are folded into it."""
    feeds = {group[0].feeder for group in groups if group[0].feeder in by_name}
    return sorted(groups, key=lambda group: any(layer.name in feeds for layer in group))


def _layer_of(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _weight(source: Source, layer: Layer, folded: Mapping[str, Tensor]) -> Tensor:
    tensor = folded.get(layer.tensor)
    return (layer.read(source) if tensor is None else layer.matrix(tensor)).float().contiguous()
