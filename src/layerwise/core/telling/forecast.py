"""What a run will take, said before it starts: bytes, memory, time.

Memory is foreseen as the most that any stage of a run holds: what the process holds before, plus
named terms, each counted from shapes or measured on a sample.  `_Walking` is the model of a run
block by block.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from layerwise.core import memory
from layerwise.core.economy import LAVISH, MICRO_BATCH_TOKENS, READ_BYTES, Economy, windows_at_once
from layerwise.core.format import Format
from layerwise.core.plan import LayerPlan, Plan, sampling, words_of
from layerwise.core.reading.checkpoint import Source, TensorInfo
from layerwise.core.reading.structure import Layer, Structure
from layerwise.core.rewriting.rewriting import Rewritten
from layerwise.core.running.apply import transform
from layerwise.core.running.evidence import GRAD, Listener, WeightGradientCollector
from layerwise.core.running.fisher import GRADIENT_WINDOWS, answered
from layerwise.core.running.runner import Runner
from layerwise.core.running.stream import ROW_STEP, rows_at_once, threads
from layerwise.core.running.walk import by_block, together
from layerwise.core.telling.sample import Sample, sampled, scaled

_ENTRIES = 1 << 20  # of the largest sample
_SIDE = 1024  # of the product that is timed
_FEW_BYTES = 1 << 20  # of a slice whose encoding is measured
_FLOAT = 4  # bytes
_LOADING, _ANSWERING = "loading the files back", "running what was loaded"
LOAD_BACK = frozenset({_LOADING, _ANSWERING})
FORESEEING, COPYING = "foreseeing the run", "copying a tensor"
_DISK_RATE = 1e9  # bytes per second, read or written


@dataclass(frozen=True)
class Outlook:
    """What is foreseen of some work.

    Attributes:
        peak_bytes: Most memory held at once.
        seconds: Wall time from here.
        stages: The memory that each stage holds.
    """

    peak_bytes: int
    seconds: float
    stages: Mapping[str, int]

    @property
    def fullest(self) -> str:
        """The stage that holds the most."""
        return max(self.stages, key=lambda stage: self.stages[stage])


@dataclass(frozen=True)
class Forecast(Outlook):
    """What is foreseen of a run.

    Attributes:
        size_bytes: Weight files of the output, exact.
        disk_bytes: Most room taken on the output's disk: the output, and what is staged beside it.
    """

    size_bytes: int
    disk_bytes: int

    def words(self) -> str:
        """One line for people."""
        size, disk, peak = (
            f"{figure / 1e6:.2f} MB"
            for figure in (self.size_bytes, self.disk_bytes, self.peak_bytes)
        )
        return (
            f"forecast: about {self.seconds:.0f} s, {peak} of memory at most ({self.fullest}), "
            f"weight files of {size}, {disk} of disk"
        )

    def as_json(self) -> Mapping[str, int | float]:
        """The figures by name."""
        names = ("size_bytes", "disk_bytes", "peak_bytes", "seconds")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Passes:
    """What is run through a model.

    Attributes:
        runner: Runs it.
        calibration: Token ids; None if no method reads what they show.
        heldout: Token ids that are compared; None for no proof.
        states: Activations of the held-out text that are carried from block to block in float32.
        proof: Windows of it whose logits are compared after the files are loaded back; 0 for none.
        comparing: Bytes that a comparison holds for each logit.
        floor: Whether the held-out text is carried in bfloat16 too.
        apart: Windows of it with which each layer that changes is looked at alone.
    """

    runner: Runner
    calibration: torch.Tensor | None
    heldout: torch.Tensor | None
    states: int
    proof: int
    comparing: float
    floor: bool = False
    apart: int = 0

    def economies(self) -> list[Economy]:
        """Ways to run it, each with less memory than the one before."""
        texts = [ids for ids in (self.calibration, self.heldout) if ids is not None]
        window = max((ids.shape[1] for ids in texts if ids.dim() > 1), default=1)
        tried = [LAVISH, Economy(on_disk=True), Economy(on_disk=True, input_by_input=True)]
        tokens = MICRO_BATCH_TOKENS // 2
        while tokens >= window and not self.runner.whole:
            tried.append(Economy(on_disk=True, input_by_input=True, tokens=tokens))
            tokens //= 2
        return tried


@dataclass(frozen=True, slots=True)
class _Group:
    """Layers that are transformed together.

    Attributes:
        layers: They.
        work: What transforming and encoding them takes.
    """

    layers: Sequence[Layer]
    work: Sample

    @property
    def reads(self) -> str:
        return self.layers[0].reads

    @property
    def count(self) -> int:
        return sum(layer.count for layer in self.layers)

    @property
    def gram(self) -> int:
        """Bytes of the Gram matrix of what they read."""
        return _FLOAT * self.layers[0].width ** 2


def ground(samples: Iterable[Sample]) -> tuple[int, int]:
    """What the process holds before any stage, and what foreseeing them held beside that."""
    told = memory.resident_bytes()
    memory.settle()
    base = memory.resident_bytes() + memory.GAPS_BYTES
    return base, max((sample.held for sample in samples), default=0) + max(0, told - base)


class Foresight:
    """Everything about a run that is measured; `forecast` is then arithmetic.

    Args:
        source: The model.
        found: Its structure.
        plan: What will be done.
        format: How the output is stored.
        size: Bytes of its weight files.
        beside: Bytes of its other files.
        passes: What is run through the model; None if tensors are streamed.
        before: The most memory that was held, or foreseen, before the run.
    """

    def __init__(
        self,
        source: Source,
        found: Structure,
        plan: Plan,
        format: Format,
        *,
        size: int,
        beside: int,
        passes: Passes | None,
        before: int,
    ) -> None:
        self.source = source
        self.found = found
        self.plan = plan
        self.format = format
        self.size = size
        self.beside = beside
        self.passes = passes
        self.before = before
        self._samples: dict[object, Sample] = {}
        self._encodings: dict[object, float] = {}
        if passes is None:
            self._streamed = [self._slice(layer) for layer in self.planned()]
        else:
            self._blocks = [self._groups(block) for block in found.blocks]
            self._passing = Passing(passes)
            if GRAD in plan.words() and passes.calibration is not None:
                self._samples[GRAD, "ending"], self._samples[GRAD, "back"] = going_back(
                    passes, self._passing.block, found, WeightGradientCollector
                )
            infos = [source.tensors[name] for name in by_block(passes.runner)[1]]
            # What is outside the blocks is then held as it was and as it is stored.
            self.around = any(format.rest(info) != info for info in infos)
        self._base, self._sampled = ground(self._samples.values())
        self._base += source.making if isinstance(source, Rewritten) else 0

    def forecast(self, economy: Economy = LAVISH) -> Forecast:
        """Foresee the run."""
        if self.passes is None:
            stages, seconds, staged = self._streaming(economy), self._streaming_seconds(), 0
        else:
            nothing = Sample(0, 0.0, 0)
            ending, back = (self._samples.get((GRAD, n), nothing) for n in ("ending", "back"))
            walk = _Walking(self, self.passes, self._blocks, self._passing, economy, ending, back)
            stages, seconds, staged = walk.stages(), walk.seconds(), walk.staged
        stages[FORESEEING] = self._sampled
        return Forecast(
            size_bytes=self.size,
            disk_bytes=self.size + self.beside + staged,
            peak_bytes=max(self.before, self._base + max(stages.values())),
            seconds=seconds,
            stages={name: self._base + held for name, held in stages.items()},
        )

    def economies(self) -> list[Economy]:
        """Ways to carry the run out, each with less memory than the one before.

        Those that change no bit come first, and of them the quickest.
        """
        if self.passes is None:
            return [LAVISH, Economy(read_bytes=READ_BYTES // 16)]
        return self.passes.economies()

    # Weights alone

    def planned(self) -> list[Layer]:
        """The layers that change."""
        return [one for one in self.found.layers.values() if self.plan.layers[one.name].steps]

    def _slice(self, layer: Layer) -> tuple[Layer, int, Sample]:
        """A layer, how many slices it is worked on in, and what one takes."""
        info = self.source.tensors[layer.tensor]
        at_once = rows_at_once(layer, self.plan.layers[layer.name], self.format, info)
        if at_once >= layer.rows:
            return layer, 1, self._work([layer])
        with threads(1):
            work = self._work([replace(layer, rows=at_once)])
        return layer, math.ceil(layer.rows / at_once), work

    def _streaming(self, economy: Economy) -> dict[str, int]:
        # A slice is read out of a mapping of its file, whose pages count until it is closed.
        largest = max(info.size for info in self.source.tensors.values())
        read = 2 * min(economy.read_bytes, largest)
        most = max(
            (work.bytes + (read if slices > 1 else 0) for _, slices, work in self._streamed),
            default=0,
        )
        return {COPYING: self.copying(economy), "transforming a layer": most}

    def copying(self, economy: Economy) -> int:
        """A slice of a tensor that no plan changes: in a mapping of its file, read, encoded."""
        planned = {layer.tensor for layer in self.planned()}
        rest = [info for info in self.source.tensors.values() if info.name not in planned]
        slices = ((min(economy.read_bytes, info.size), self._encoding(info)) for info in rest)
        return max((int(size * (2 + encoding)) for size, encoding in slices), default=0)

    def _encoding(self, info: TensorInfo) -> float:
        """Bytes that encoding such a tensor takes, for each of its own."""
        kept = self.format.rest(info)
        if kept is None or not info.count or len(info.shape) < 2:
            return 0.0
        key = (kept.dtype, info.dtype, info.shape[1:])
        if key not in self._encodings:
            together = self.format.together(info)
            few = max(1, _FEW_BYTES * info.shape[0] // info.size // together) * together
            rows = torch.zeros(min(few, info.shape[0]), *info.shape[1:], dtype=info.dtype)
            made = sampled(lambda: self.format.encode_rest(info, rows))
            self._encodings[key] = made.bytes / rows.nbytes
        return self._encodings[key]

    def _streaming_seconds(self) -> float:
        work = sum(slices * one.seconds for _, slices, one in self._streamed)
        return work + (self.size + _bytes(self.source)) / _DISK_RATE

    # Block by block

    def _groups(self, block: str) -> list[_Group]:
        layers = [layer for layer in self.found.layers.values() if layer.block == block]
        return [
            _Group(group, self._work(group)) for group in together(layers, self.plan, whole=True)
        ]

    def _work(self, group: Sequence[Layer]) -> Sample:
        """What transforming layers that read one input takes; measured once for all alike."""
        plans = [self.plan.layers[layer.name] for layer in group]
        # Which density it is moves nothing much, and each of a thousand would be sampled.
        plans = [
            replace(one.work, density=0.5 if one.density < 1 else 1.0, why="") for one in plans
        ]
        dtype = self.source.tensors[group[0].tensor].dtype
        shapes = tuple((layer.rows, layer.width) for layer in group)
        key = (shapes, tuple(plans), dtype)
        if key not in self._samples:

            def work(side: float) -> "_Work":
                return _Work(group, plans, self.plan, self.format, dtype, side)

            self._samples[key] = scaled(work, sides_of(group))
        return self._samples[key]


class _Work:
    """Layers with both sides so many times as long, transformed and encoded."""

    def __init__(
        self,
        group: Sequence[Layer],
        plans: Sequence[LayerPlan],
        plan: Plan,
        format: Format,
        dtype: torch.dtype,
        side: float,
    ) -> None:
        self.plan = plan
        self.format = format
        self.dtype = dtype
        self.layers = [
            smaller(layer, side, _rows_together(format, layer, one, dtype))
            for layer, one in zip(group, plans, strict=True)
        ]
        self.plans = [
            replace(one, rank=math.ceil(one.rank * side) if one.rank else 0) for one in plans
        ]
        words = words_of(plans)
        self.evidence = evidence_of(words, self.layers)
        self.options = sampling(plans, plan.options)

    def __call__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        weights = [
            torch.randn(layer.rows, layer.width, generator=generator) for layer in self.layers
        ]
        done = transform(self.layers, weights, self.evidence, self.plans, self.options)
        del weights
        restored: list[torch.Tensor] = []
        while done:
            result = done.pop(0)
            info = TensorInfo(
                result.layer.tensor, self.dtype, (result.layer.rows, result.layer.width)
            )
            restored.append(self.format.restored(result, self.dtype))
            self.format.encode(result, info)


def smaller(layer: Layer, side: float, together: int) -> Layer:
    """A layer with sides so many times as long; its rows are a multiple of so many."""
    rows = max(1, round(layer.rows * side))
    if rows < layer.rows:
        rows = min(layer.rows, max(together, rows // together * together))
    width = round(layer.width * side)
    return replace(layer, rows=rows, width=width, layout="linear", expert=None)


def evidence_of(words: Collection[str], layers: Sequence[Layer]) -> dict[str, Any]:
    """Evidence that a sample of layers that read one input can do with."""
    width = layers[0].width
    made: dict[str, Callable[[], Any]] = {
        "gram": lambda: torch.eye(width),
        "norm": lambda: torch.ones(width),
        "magnitude": lambda: torch.ones(width),
        "peak": lambda: torch.ones(width),
        "attention": lambda: torch.ones(1, 1),
        "inputs": lambda: torch.ones(1, width),
        GRAD: lambda: {one.name: torch.ones(one.rows, width) for one in layers},
    }
    return {word: made[word]() for word in made if word in words}


def _rows_together(format: Format, layer: Layer, plan: LayerPlan, dtype: torch.dtype) -> int:
    """Rows that a sample must hold a multiple of."""
    together = format.together(TensorInfo(layer.tensor, dtype, (layer.rows, layer.width)))
    return math.lcm(together, ROW_STEP) if format.whole(plan) else together


def sides_of(group: Sequence[Layer]) -> Sequence[float]:
    """How long the sides of samples are, a layer's own being 1."""
    width, rows = group[0].width, sum(layer.rows for layer in group)
    most = math.sqrt(_ENTRIES / (rows * width))
    if most >= 1:
        return (1.0,)
    # Widths keep what formats and methods ask of them: whole groups of a row, three of them even
    # where that takes twice as many entries.
    units = (u for u in (256, 128, 32) if width % u == 0 and most * width * math.sqrt(2) >= 3 * u)
    unit = next(units, 1)
    longest = max(3, int(most * width / unit))
    widths = {round(longest * share) * unit for share in (1, 2 / 3, 1 / 3)}
    return [one / width for one in sorted(widths, reverse=True)]


class Passing:
    """What one window takes on its way through a model, with weights that take no memory."""

    def __init__(self, passes: Passes) -> None:
        runner = passes.runner.blank()
        texts = [ids for ids in (passes.calibration, passes.heldout) if ids is not None]
        first = texts[0][:1]
        self.block = max(runner.blocks, key=runner.block_bytes)
        hidden = runner.start(first)
        self.window = 0 if runner.whole else hidden.numel() * hidden.element_size()
        nothing = Sample(0, 0.0, 0)
        self.embedding = nothing if runner.whole else sampled(lambda: [*runner.starting(first)])
        self.through = sampled(lambda: [*runner.carry(self.block, hidden, {})])
        self.ending = nothing
        if not runner.whole and passes.heldout is not None:
            self.ending = sampled(lambda: [*runner.logits(hidden, first, {})])
        width = hidden.shape[-1]
        self.rate = _products_per_second(width)


def going_back(
    passes: Passes, block: str, found: Structure, collecting: Callable[[Layer], Listener]
) -> tuple[Sample, Sample]:
    """One window's gradient of the answer, and its way back through a block.

    What collectors hold is not of a window, and not in it.
    """
    assert passes.calibration is not None
    runner, first = passes.runner.blank(), passes.calibration[:1]
    hidden = runner.start(first)
    after = runner.forward(block, hidden, {})
    layers = found.layers.values()
    inside = [one for one in layers if runner.whole or one.block == block]
    collectors = {layer.name: collecting(layer) for layer in inside}

    def loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(*answered(runner, logits, ids))

    ending = sampled(lambda: runner.gradient(after, first, loss))
    wanted = torch.zeros_like(after)
    return ending, sampled(lambda: runner.backward(block, hidden, wanted, collectors))


@dataclass(frozen=True)
class _Walking:
    """The model of a run block by block: the memory of each stage, in terms with names."""

    seen: Foresight
    passes: Passes
    blocks: Sequence[Sequence[_Group]]
    passing: Passing
    economy: Economy
    ending: Sample
    back: Sample

    @property
    def runner(self) -> Runner:
        return self.passes.runner

    @property
    def windows(self) -> int:
        """Windows of all activations that are carried."""
        count = 0 if self.passes.calibration is None else len(self.passes.calibration)
        return count + (self.passes.states + self.passes.floor) * len(self._shown)

    @property
    def carried(self) -> int:
        """Bytes of all activations; those in bfloat16 take half."""
        narrow = len(self._shown) // 2 if self.passes.floor else 0
        return (self.windows - narrow) * self.passing.window

    @property
    def _shown(self) -> torch.Tensor:
        """The windows carried for the proof; without one, a single window is."""
        if self.passes.heldout is not None:
            return self.passes.heldout
        assert self.passes.calibration is not None
        return self.passes.calibration[:1]

    @property
    def states(self) -> int:
        """Bytes of activations in memory between blocks."""
        return 0 if self.economy.on_disk else self.carried

    @property
    def staged(self) -> int:
        """Bytes of activations on disk: those of a step, and of the one before.

        What the original sees of the calibration text is none that a stopped run needs.
        """
        aside = self.seen.plan.inputs == "original" and not self.economy.on_disk
        calibration = 0 if self.passes.calibration is None else len(self.passes.calibration)
        steps = len(self.runner.blocks) + self.economy.on_disk
        carried = self.carried - aside * calibration * self.passing.window
        return min(2, steps) * carried + self.economy.on_disk * self._gone_back

    @property
    def at_once(self) -> int:
        """Windows that go through a block at once."""
        return self._at_once(self._shown if self.passes.calibration is None else None)

    def _at_once(self, ids: torch.Tensor | None) -> int:
        given = self.passes.calibration if ids is None else ids
        assert given is not None
        return min(self.runner.running(self.economy.tokens).batch(given), len(given))

    @property
    def grams(self) -> bool:
        calibrated = self.passes.calibration is not None
        return calibrated and "gram" in self.seen.plan.words()

    @property
    def gradients(self) -> int:
        """Windows whose gradients go back to the weights."""
        given = self.passes.calibration
        wanted = given is not None and GRAD in self.seen.plan.words()
        return min(len(given), GRADIENT_WINDOWS) if given is not None and wanted else 0

    @property
    def _gone_back(self) -> int:
        """Bytes of what each block sees and of the gradient of its answer."""
        return 2 * len(self.runner.blocks) * self.gradients * self.passing.window

    @property
    def kept_back(self) -> int:
        """As many of them as are in memory."""
        return 0 if self.economy.on_disk else self._gone_back

    def back_through(self) -> int:
        """What gradients hold on their way back through a block."""
        if not self.gradients:
            return 0
        assert self.passes.calibration is not None
        at_once = self._at_once(self.passes.calibration[: self.gradients])
        return 2 * self.gradients * self.passing.window + at_once * self.back.bytes

    def stages(self) -> dict[str, int]:
        """Bytes that each stage holds beside what the process held before."""
        made = {
            "running the embeddings": self.embeddings(),
            COPYING: self.states + self.seen.copying(self.economy),
        }
        for groups in self.blocks:
            name = groups[0].layers[0].block
            for stage, held in self.in_block(name, groups).items():
                made[stage] = max(made.get(stage, 0), held)
        if self.gradients:
            made["the gradient of the answer"] = self.answered()
        if self.passes.proof:
            made["comparing logits"] = self.comparing()
            if self.passes.apart:
                made["looking at each layer alone"] = self.apart()
            made[_LOADING], made[_ANSWERING] = self.loading(), self.answering()
        return made

    def embeddings(self) -> int:
        outer = 0 if self.runner.whole else self.runner.outer_bytes()
        return outer + self.states + self.at_once * self.passing.embedding.bytes

    def in_block(self, name: str, groups: Sequence[_Group]) -> dict[str, int]:
        """The stages of one block."""
        block = self.runner.block_bytes("" if self.runner.whole else name)
        through = self.at_once * self.passing.through.bytes
        # A gram matrix for each input, however many groups read it.
        each = {group.reads: group.gram if self.grams else 0 for group in groups}
        for group in groups if self.gradients else ():
            each[group.reads] += _FLOAT * group.count
        gathered = sum(each.values())
        if self.economy.input_by_input:
            counts = [_FLOAT * group.count for group in groups]
            gathered = max(sum(counts[:n]) + each[group.reads] for n, group in enumerate(groups))
        carried = self.states + self.kept_back
        gathering = max(through, self.back_through())
        held = {
            "gathering evidence in a block": carried + block + gathering + gathered,
            "carrying activations through a block": carried + block + through,
        }
        done = most = 0
        for number, group in enumerate(groups):
            waiting = {other.reads for other in groups[number:]}
            left = each[group.reads]
            if not self.economy.input_by_input:
                left = sum(each[reads] for reads in waiting)
            most = max(most, done + left + group.work.bytes)
            done += _FLOAT * group.count
        held["transforming a block"] = carried + most
        return held

    def answered(self) -> int:
        """What each block sees, and the gradient of the loss at the last one's answer."""
        assert self.passes.calibration is not None
        ids = self.passes.calibration[: self.gradients]
        runner = self.runner.running(self.economy.tokens)
        blocks = 0 if self.economy.on_disk else 1 + len(runner.blocks)
        outer = 0 if runner.whole else runner.outer_bytes()
        at_once = min(runner.answering(ids), len(ids))
        kept = (1 + blocks) * self.gradients * self.passing.window
        return self.states + outer + kept + at_once * self.ending.bytes

    def comparing(self) -> int:
        """Logits of the result and of the original, and what a comparison makes of them."""
        runner = self.runner
        if runner.whole:
            return self.states + self.kept_logits
        outer = runner.outer_bytes() * (1 + self.seen.around)
        outer += runner.outer_bytes() // 2 if self.passes.floor else 0
        return self.states + outer + self._compared + self.kept_logits

    @property
    def _compared(self) -> int:
        """What a comparison holds at once."""
        runner, ids = self.runner, self._shown
        batch = min(runner.running(self.economy.tokens).answering(ids), len(ids))
        each = _FLOAT * ids.shape[1] * runner.vocabulary
        return batch * max(self.passing.ending.bytes, int(each * self.passes.comparing))

    def apart(self) -> int:
        """Activations of all layers that are carried on, before a block, in it and after it."""
        block = max(self.runner.block_bytes(block) for block in self.runner.blocks)
        carried = (1 + len(self.seen.planned())) * self.passes.apart * self.passing.window
        at_once = self.at_once * self.passing.through.bytes
        carried = 0 if self.economy.on_disk else carried
        running = block + at_once + 2 * carried
        return self.kept_logits + max(running, self.runner.outer_bytes() + self._compared + carried)

    @property
    def kept_logits(self) -> int:
        """Logits in memory that those of the loaded model are compared with."""
        length = self._shown.shape[1] if self._shown.dim() > 1 else 1
        return _FLOAT * self.passes.proof * length * self.runner.vocabulary

    @property
    def loaded(self) -> tuple[int, int]:
        """Bytes of float32 weights that a loader makes, and of files that it keeps mapped."""
        source, format = self.seen.source, self.seen.format
        planned = {layer.tensor for layer in self.seen.planned()}
        if format.reads:
            rest = sum(i.size for i in source.tensors.values() if i.name not in planned)
            return sum(_FLOAT * info.count for info in source.tensors.values()) + rest, 0
        # What lies in a file in float32 is used where it lies.
        copied = sum(
            _FLOAT * info.count
            for info in source.tensors.values()
            if info.dtype != torch.float32 or (format.packs and info.name in planned)
        )
        as_it_is = sum(i.size for i in source.tensors.values() if i.dtype == torch.float32)
        return copied, self.seen.size if format.packs else as_it_is

    def loading(self) -> int:
        copied, _ = self.loaded
        largest = max((layer.count for layer in self.seen.planned()), default=0)
        unpacking = int(self.seen.format.unpacking * largest)
        files = 0 if self.seen.format.reads else self.seen.size
        return copied + files + unpacking + self.kept_logits

    def answering(self) -> int:
        runner, ids = self.runner, self._shown
        copied, mapped = self.loaded
        at_once = 64
        if not runner.whole:
            at_once = windows_at_once(ids.shape[1], runner.vocabulary, self.economy.tokens)
        at_once = min(at_once, self.passes.proof)
        working = at_once * max(self.passing.through.bytes, self.passing.ending.bytes)
        return copied + mapped + self.kept_logits + working

    def seconds(self) -> float:
        """Wall time."""
        blocks = sum(self.runner.block_bytes(block) for block in self.runner.blocks)
        through = self.passing.through.seconds * blocks
        through /= max(1, self.runner.block_bytes(self.passing.block))
        calibration = 0 if self.passes.calibration is None else len(self.passes.calibration)
        passes = self.windows + calibration
        if self.economy.input_by_input:
            passes += calibration * (max(len(groups) for groups in self.blocks) - 1)
        compared = 2 * len(self._shown) if self.passes.proof else 0
        seconds = (passes + self.passes.proof) * through
        seconds += (compared + self.passes.proof) * self.passing.ending.seconds
        if self.gradients:
            share = blocks / max(1, self.runner.block_bytes(self.passing.block))
            back = 2 * share * self.back.seconds + self.ending.seconds
            seconds += self.gradients * (through + back)
        # A layer that is looked at alone is carried through half of the blocks, on average.
        alone = len(self.seen.planned()) * self.passes.apart
        seconds += alone * (through / 2 + 2 * self.passing.ending.seconds)
        seconds += sum(group.work.seconds for groups in self.blocks for group in groups)
        if self.grams and self.passes.calibration is not None:
            inputs = {group.reads: group.gram for groups in self.blocks for group in groups}
            products = sum(inputs.values()) / _FLOAT
            seconds += 2 * self.passes.calibration.numel() * products / self.passing.rate
        # Each block is read for every pass through it, and once to be transformed; activations
        # are written once for each block.
        read = _bytes(self.seen.source) * 3 + self.seen.size * (2 if self.passes.proof else 1)
        staged = self.carried * len(self.runner.blocks)
        return seconds + (read + staged) / _DISK_RATE


def _bytes(source: Source) -> int:
    return sum(info.size for info in source.tensors.values())


def _products_per_second(width: int) -> float:
    """Multiplications and additions per second of a matrix product."""
    side = min(width, _SIDE)
    inputs, weight = torch.ones(_SIDE, side), torch.ones(side, side)
    torch.mm(inputs, weight)
    begun = time.perf_counter()
    for _ in range(4):
        torch.mm(inputs, weight)
    return 4 * 2 * _SIDE * side * side / (time.perf_counter() - begun)
