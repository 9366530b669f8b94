"""What looking for a plan will take, foreseen as `core/telling` foresees carrying one out."""

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from layerwise.core import catalogue, memory
from layerwise.core.economy import LAVISH, Economy
from layerwise.core.keeping.cache import Cache
from layerwise.core.keeping.candidates import Candidates, Options
from layerwise.core.plan import LayerPlan, sampling, words_of
from layerwise.core.reading.structure import Layer, by_input
from layerwise.core.running.ablation import ABLATED_WINDOWS, EFFECTS, LEFT_OUT
from layerwise.core.running.evidence import (
    GRAD,
    GradientCollector,
    WeightGradientCollector,
    calibrated_words,
)
from layerwise.core.running.fisher import GRADIENT_WINDOWS
from layerwise.core.running.hessian import Change, divergence, shares
from layerwise.core.telling.forecast import (
    FORESEEING,
    Outlook,
    Passes,
    Passing,
    evidence_of,
    going_back,
    ground,
    sides_of,
    smaller,
)
from layerwise.core.telling.sample import Sample, sampled, scaled
from layerwise.flow.preparing import Prepared
from layerwise.flow.survey import Trial

_FLOAT = torch.float32.itemsize


@dataclass(frozen=True)
class Looking:
    """What a search looks at.

    Attributes:
        levels: Those to try, by layer: what is known of them already is not among them.
        options: Options of methods, by id.
        measures: Measures of layers or blocks.
        gradients: Windows whose gradients go back through the model.
        graphs: Times that the whole model is derived twice for a window.
        apart: Windows with which layers are looked at alone.
        layers: How many of them.
        together: Windows with which whole plans are tried.
        comparing: Bytes that a comparison holds for each logit.
    """

    levels: Mapping[str, Sequence[LayerPlan]]
    options: Options
    measures: Sequence[catalogue.Method] = ()
    gradients: int = 0
    graphs: int = 0
    apart: int = 0
    layers: int = 0
    together: int = 0
    comparing: float = 0.0

    @property
    def of_weights(self) -> bool:
        """Whether a level or a measure reads the gradient of a weight."""
        tried = words_of(plan for plans in self.levels.values() for plan in plans)
        return GRAD in tried | calibrated_words(self.measures)

    @property
    def nothing(self) -> bool:
        """Everything is known."""
        runs = (self.gradients, self.graphs, self.apart, self.together)
        return not (self.levels or self.measures or any(runs))


class SearchForesight:
    """Everything about a search that is measured; `forecast` is then arithmetic.

    Args:
        prepared: The model.
        looking: What is looked at.
        passes: What is run through the model; None if weights alone are looked at.

    Attributes:
        groups: Layers that read one input, and what trying levels on them takes.
        passing: One window on its way through the model; not there without `passes`.
        ending: The gradient of one window's answer.
        back: Its way back through the largest block.
        graph: Second derivatives of the largest block by changes of its layers, for one window.
        answering: Those of its answer.
        recalled: Taking the largest layer out of the cache.
    """

    def __init__(self, prepared: Prepared, looking: Looking, passes: Passes | None) -> None:
        self.prepared = prepared
        self.looking = looking
        self.passes = passes
        self._before = memory.peak_bytes()
        self._trials: dict[object, Sample] = {}
        layers = [layer for layer in prepared.found.layers.values() if self._asked(layer)]
        self.groups = [(group, self._trial(group)) for group in by_input(layers).values()]
        nothing = Sample(0, 0.0, 0)
        self.ending = self.back = self.recalled = nothing
        self.graph = self.answering = nothing
        if passes is not None:
            self.passing = Passing(passes)
            if passes.calibration is not None and (looking.gradients or looking.of_weights):
                collecting = WeightGradientCollector if looking.of_weights else GradientCollector
                self.ending, self.back = going_back(
                    passes, self.passing.block, prepared.found, collecting
                )
            if looking.graphs:
                self.graph, self.answering = self._graph(passes)
            if looking.apart or looking.together:
                self.recalled = self._recall()
        self._base, self._sampled = ground(
            [*self._trials.values(), self.ending, self.back, self.graph, self.answering]
        )

    def forecast(self, economy: Economy = LAVISH) -> Outlook:
        """Foresee the search."""
        stages = {FORESEEING: self._sampled}
        stages["trying levels of a layer"] = max((work.bytes for _, work in self.groups), default=0)
        seconds = sum((work.seconds for _, work in self.groups), 0.0)
        if self.passes is not None:
            running = _Running(self, self.passes, economy)
            stages |= running.stages()
            seconds += running.seconds()
        return Outlook(
            peak_bytes=max(self._before, self._base + max(stages.values())),
            seconds=seconds,
            stages={name: self._base + held for name, held in stages.items()},
        )

    def economies(self) -> list[Economy]:
        """Ways to look, each with less memory than the one before."""
        return [LAVISH] if self.passes is None else self.passes.economies()

    def _asked(self, layer: Layer) -> bool:
        return bool(self.looking.levels.get(layer.name))

    def _trial(self, group: Sequence[Layer]) -> Sample:
        """What trying levels on layers that read one input takes; measured once for all alike."""
        levels = [_telling(self.looking.levels[layer.name]) for layer in group]
        every = sum(len(self.looking.levels[layer.name]) for layer in group)
        shapes = tuple((layer.rows, layer.width) for layer in group)
        key = (shapes, tuple(map(tuple, levels)), every)
        if key not in self._trials:
            with tempfile.TemporaryDirectory() as folder:
                cache = Cache(Path(folder), 1 << 40)
                work = functools.partial(_Trying, group, levels, self.looking.options, cache)
                sample = scaled(work, sides_of(group))
            share = every / sum(map(len, levels))
            self._trials[key] = Sample(sample.bytes, sample.seconds * share, sample.held)
        return self._trials[key]

    def _graph(self, passes: Passes) -> tuple[Sample, Sample]:
        """Second derivatives of one window: through the largest block, and of its answer."""
        assert passes.calibration is not None
        runner, block = passes.runner.blank(), self.passing.block
        first = passes.calibration[:1]
        hidden, answer = runner.start(first), runner.differentiable(block)
        changes = [
            Change(layer, *torch.zeros(2, layer.rows, layer.width))
            for layer in self.prepared.found.layers.values()
            if runner.whole or layer.block == block
        ]

        def through(made: torch.Tensor) -> torch.Tensor:
            parts = zip(changes, made, strict=True)
            answers = {change.layer.name: change.partly(part) for change, part in parts}
            return answer(hidden, answers).square().sum()

        logits = torch.zeros(first.shape[1] if first.dim() > 1 else 1, runner.vocabulary)

        def ending(made: torch.Tensor) -> torch.Tensor:
            return divergence(logits, logits + made)

        return sampled(lambda: shares(through, len(changes))), sampled(lambda: shares(ending, 1))

    def _recall(self) -> Sample:
        """Taking the largest layer out of the cache."""
        layer = max(self.prepared.found.layers.values(), key=lambda one: one.count)
        plans = self.looking.levels.get(layer.name, ())
        plan = plans[0] if plans else LayerPlan(bits=4)
        with tempfile.TemporaryDirectory() as folder:
            cache = Cache(Path(folder), 1 << 40)

            def work(side: float) -> Callable[[], object]:
                trying = _Trying([layer], [[plan]], self.looking.options, cache, side)
                trying()
                recalled, options = trying.layers[0], self.looking.options
                return lambda: Candidates(cache, str(side)).find(recalled, plan, options)

            return scaled(work, sides_of([layer]))


class _Trying:
    """Layers with both sides so many times as long, under some levels, which are kept."""

    def __init__(
        self,
        group: Sequence[Layer],
        levels: Sequence[Sequence[LayerPlan]],
        options: Options,
        cache: Cache,
        side: float,
    ) -> None:
        self.layers = [smaller(layer, side, 1) for layer in group]
        self.levels = {one.name: plans for one, plans in zip(group, levels, strict=True)}
        tried = [plan for plans in levels for plan in plans]
        self.options = sampling(tried, options)
        self.candidates = Candidates(cache, str(side))
        words = words_of(tried) | {"gram"}
        self.evidence = evidence_of(words, self.layers)

    def __call__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        weights = [
            torch.randn(layer.rows, layer.width, generator=generator) for layer in self.layers
        ]
        trial = Trial(self.layers, weights, self.evidence, self.options)
        trial.losses(self.levels, {}, self.candidates)


def _telling(plans: Sequence[LayerPlan]) -> list[LayerPlan]:
    """For each sequence of methods, the levels that hold the most: others hold no more."""
    chosen: dict[tuple[str, ...], LayerPlan] = {}
    for plan in plans:
        methods = tuple(id for id, _ in plan.steps)
        best = chosen.setdefault(methods, plan)
        if plan.rank > best.rank:
            chosen[methods] = plan
    return list(chosen.values())


@dataclass(frozen=True)
class _Running:
    """The memory of each stage that runs the model, in terms with names."""

    seen: SearchForesight
    passes: Passes
    economy: Economy

    @property
    def _block(self) -> int:
        runner = self.passes.runner
        return max(runner.block_bytes(block) for block in runner.blocks)

    @property
    def _outer(self) -> int:
        return 0 if self.passes.runner.whole else self.passes.runner.outer_bytes()

    @property
    def _window(self) -> int:
        return self.seen.passing.window

    def _carried(self, windows: int) -> int:
        """Activations in memory between blocks."""
        return 0 if self.economy.on_disk else windows * self._window

    def _through(self, ids: torch.Tensor) -> int:
        """What the windows that go through a block at once hold."""
        return self._at_once(ids) * self.seen.passing.through.bytes

    def _at_once(self, ids: torch.Tensor) -> int:
        runner = self.passes.runner.running(self.economy.tokens)
        return min(runner.batch(ids), len(ids))

    def _answered(self, ids: torch.Tensor) -> int:
        runner = self.passes.runner.running(self.economy.tokens)
        return min(runner.answering(ids), len(ids))

    def stages(self) -> dict[str, int]:
        """Bytes that each stage holds beside what the process held before."""
        looking, made = self.seen.looking, dict[str, int]()
        if self.passes.calibration is not None and (looking.levels or looking.measures):
            made |= self._survey(self.passes.calibration)
        if self.passes.calibration is not None and looking.gradients:
            ids = self.passes.calibration[: looking.gradients]
            for stage, held in self._gradients(ids).items():
                made[stage] = max(made.get(stage, 0), held)
        if looking.graphs:
            made["deriving the whole model twice"] = self._graph()
        if self.passes.calibration is not None and looking.apart:
            ids = self.passes.calibration[: looking.apart]
            carried = self._carried((1 + looking.layers) * len(ids))
            made["looking at each layer alone"] = self._probing(ids, 2 * carried, carried)
        if self.passes.heldout is not None and looking.together:
            carried = self._carried(2 * len(self.passes.heldout))
            held = self._probing(self.passes.heldout, carried, carried)
            made["trying whole plans"] = held
        return made

    def _survey(self, ids: torch.Tensor) -> dict[str, int]:
        looking, runner = self.seen.looking, self.passes.runner
        back = ids[: GRADIENT_WINDOWS if looking.of_weights else 0]
        of_blocks = any(method.unit == "block" for method in looking.measures)
        carried = self._carried(len(ids))
        # The model as it is runs beside those without a block.
        without = self._carried(self._without + self._without // len(runner.blocks))
        kept = self._carried(2 * len(runner.blocks) * len(back)) + without
        running = carried + kept + self._block + self._through(ids)
        embedding = self._at_once(ids) * self.seen.passing.embedding.bytes
        made = {
            "running the embeddings": carried + self._outer + embedding,
            "carrying activations through a block": running + of_blocks * carried,
        }
        if without:
            made["leaving blocks out"] = running + self._outer + without
        if of_blocks:
            # A measure compares what goes in with what comes out, and may copy both.
            made["measuring a block"] = 4 * len(ids) * self._window
        gathered = trying = 0
        for block in runner.blocks:
            groups = [
                (_FLOAT * self._evidence(group), work)
                for group, work in self.seen.groups
                if runner.whole or group[0].block == block
            ]
            for number, (gram, work) in enumerate(groups):
                left = gram
                if not self.economy.input_by_input:
                    left = sum(other for other, _ in groups[number:])
                gathered = max(gathered, left)
                trying = max(trying, left + work.bytes)
        if gathered:
            made["gathering evidence in a block"] = running + gathered
            made["trying levels of a layer"] = carried + kept + trying
        if len(back):
            for stage, held in self._gradients(back).items():
                made[stage] = carried + held
            # They go back through a block once more, to its weights.
            made["carrying gradients back"] += gathered
        return made

    @property
    def _without(self) -> int:
        """Windows that run without a block, each way in which blocks are left out counted."""
        if self.passes.calibration is None:
            return 0
        read = {word for measure in self.seen.looking.measures for word in measure.evidence}
        ways = LEFT_OUT.keys() & {EFFECTS.get(word, word) for word in read}
        windows = min(ABLATED_WINDOWS, len(self.passes.calibration))
        return len(ways) * len(self.passes.runner.blocks) * windows

    def _evidence(self, group: Sequence[Layer]) -> int:
        """Entries of a gram matrix of what layers read, and of the gradients of their weights."""
        gradients = sum(layer.count for layer in group) if self.seen.looking.of_weights else 0
        return group[0].width ** 2 + gradients

    def _gradients(self, ids: torch.Tensor) -> dict[str, int]:
        runner, count = self.passes.runner, len(ids)
        seen = self._carried(count * (1 + len(runner.blocks)))
        # To go back to weights later, what each block sees is kept, and what comes back to it.
        later = self.seen.looking.of_weights
        kept = self._carried(count * 2 * len(runner.blocks)) if later else seen
        gradient = count * self._window
        back = self._at_once(ids) * self.seen.back.bytes
        ending = self._answered(ids) * self.seen.ending.bytes
        return {
            "the gradient of the answer": seen + self._outer + gradient + ending,
            "carrying gradients back": kept + self._block + 2 * gradient + back,
        }

    @property
    def _share(self) -> float:
        """All blocks, as multiples of the largest one."""
        runner = self.passes.runner
        blocks = sum(runner.block_bytes(block) for block in runner.blocks)
        return blocks / max(1, runner.block_bytes(self.seen.passing.block))

    def _graph(self) -> int:
        """The whole model, what is added to its layers, and the graph of one window."""
        runner = self.passes.runner
        outer = 0 if runner.whole else runner.outer_bytes()
        weights = sum(runner.block_bytes(block) for block in runner.blocks)
        layers = sum(one.count for one in self.seen.prepared.found.layers.values())
        graph = int(self._share * self.seen.graph.bytes) + self.seen.answering.bytes
        return outer + weights + 2 * _FLOAT * layers + graph

    def _probing(self, ids: torch.Tensor, carried: int, left: int) -> int:
        """Plans through the model: while they are carried, and what is left when they answer."""
        runner, at_once = self.passes.runner, self._answered(ids)
        changed = self._block + self.seen.recalled.bytes
        running = carried + self._block + max(self.seen.recalled.bytes, self._through(ids))
        logits = _FLOAT * (ids.shape[1] if ids.dim() > 1 else 1) * runner.vocabulary
        compared = int(logits * self.seen.looking.comparing)
        answer = max(self.seen.passing.ending.bytes, compared)
        return max(changed, running, left + self._outer + at_once * answer)

    def seconds(self) -> float:
        """Wall time of what runs the model."""
        looking, passing = self.seen.looking, self.seen.passing
        runner = self.passes.runner
        share = self._share
        through = passing.through.seconds * share
        calibration = 0 if self.passes.calibration is None else len(self.passes.calibration)
        passes = 2 * calibration if looking.levels else 0
        if self.economy.input_by_input and looking.levels:
            inputs = len({group[0].reads for group, _ in self.seen.groups})
            passes += calibration * (inputs // len(runner.blocks) - 1)
        back = looking.gradients
        if looking.of_weights:
            back += 2 * min(calibration, GRADIENT_WINDOWS)
        passes += back + 2 * looking.together
        seconds = passes * through + back * (
            self.seen.ending.seconds + self.seen.back.seconds * share
        )
        twice = self.seen.graph.seconds * share + self.seen.answering.seconds
        seconds += looking.graphs * twice
        alone = looking.apart * looking.layers + self._without
        return seconds + alone * (through / 2 + 2 * passing.ending.seconds)
