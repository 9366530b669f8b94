"""Look at every layer of a model without changing it: scores, and the error at each level."""

import contextlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from layerwise.core import catalogue
from layerwise.core.catalogue import PAIRED
from layerwise.core.economy import LAVISH, Economy
from layerwise.core.errors import UserError
from layerwise.core.keeping.candidates import Candidates, Losses, Options
from layerwise.core.plan import LayerPlan, check_options, words_of
from layerwise.core.progress import Progress
from layerwise.core.reading.checkpoint import Source
from layerwise.core.reading.structure import Layer, Structure, by_input
from layerwise.core.results import Coded, record
from layerwise.core.running.apply import Made, Transformed, transform
from layerwise.core.running.carried import Activations, Shelf, shelf
from layerwise.core.running.evidence import GRAD, SLOPES, calibrated_words, of_layer
from layerwise.core.running.fisher import WeightGradients
from layerwise.core.running.joint import learned_together
from layerwise.core.running.runner import Runner
from layerwise.core.running.slopes import WeightSlopes
from layerwise.core.running.walk import Seen, alone
from layerwise.flow.pairing import BEFOREHAND, Told, evidence_for
from layerwise.flow.preparing import Prepared
from layerwise.flow.views import View, Views, weight_of

# What a measure answered, by layer and name.
Records = Mapping[str, Mapping[str, float]]
# Codes that were learned together, by the level that all layers had then, and by layer.
Learnt = Mapping[LayerPlan, Mapping[str, Coded]]


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found.

    Attributes:
        levels: Plans that were tried, by layer.
        losses: What they cost, by layer.
        records: What measures answered, by measure, layer and name; the name of a measure's one
            number is "".
        about: What measures say of the whole model, by measure and name.
        refused: Measures that cannot be had of this model, with the reason.
    """

    levels: Mapping[str, Sequence[LayerPlan]]
    losses: Mapping[str, Losses]
    records: Mapping[str, Records]
    about: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    refused: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Score of each layer, by measure and then by layer: the first number of its record."""
        return {
            measure: {layer: next(iter(found.values())) for layer, found in records.items()}
            for measure, records in self.records.items()
        }

    @property
    def columns(self) -> dict[str, dict[str, float]]:
        """All numbers of each layer, by `measure` or `measure.name` and then by layer."""
        made: dict[str, dict[str, float]] = {}
        for measure, records in self.records.items():
            for layer, found in records.items():
                for name, value in found.items():
                    made.setdefault(f"{measure}.{name}".rstrip("."), {})[layer] = value
        return made

    @property
    def errors(self) -> dict[str, list[float]]:
        """Share of each layer's energy that is lost at each of its levels, in their order."""
        return {
            name: [self.losses[name].error(plan) for plan in plans]
            for name, plans in self.levels.items()
        }


def survey(
    prepared: Prepared,
    levels: Mapping[str, Sequence[LayerPlan]],
    *,
    options: Options,
    measures: Sequence[catalogue.Method] = (),
    base: Source | None = None,
    lenient: bool = False,
    candidates: Candidates | None = None,
    economy: Economy = LAVISH,
    progress: Progress,
) -> Survey:
    """Score every layer, and try levels on it, on what it sees in the original model.

    Args:
        prepared: The model, opened.
        levels: Plans to try, by layer.
        options: Options of methods, by id.
        measures: Measures of a layer or a block; those that read an approximation see the first
            level.
        base: Another model of the same layers, for measures that compare with it.
        lenient: Leave out a measure that refuses a layer, with its reason, instead of stopping.
        candidates: Where what levels make of layers is kept; what is there is not made again.
        economy: What to hold on disk, and how much to take up at a time.
        progress: Is told of each block.

    Raises:
        UserError: A method needs calibration and there is none.
    """
    found, runner = prepared.found, prepared.runner
    tried = [catalogue.get(id) for plans in levels.values() for p in plans for id, _ in p.steps]
    calibration = prepared.calibration.ids if prepared.calibration else None
    _check(prepared, [*tried, *measures])
    _check_base(measures, base)
    known = known_losses(found, levels, options, candidates)
    if not measures and not missing(known, levels):
        return Survey(levels, {name: known[name] for name in levels}, {})
    of_blocks = [m for m in measures if m.unit == "block"]
    look = _Look(
        prepared.source,
        levels,
        options,
        [m for m in measures if m.unit == "layer"],
        candidates,
        known,
        lenient,
    )
    per_layer = any("norms" in method.evidence for method in of_blocks)
    words = look.words() | ({"norm"} if per_layer else set())
    runs = calibration is not None or prepared.labelled is not None
    blocks = runner.blocks if runner and runs else found.blocks
    progress.stage("measure", len(blocks))
    records: dict[str, dict[str, Mapping[str, float]]] = {m.name: {} for m in measures}
    folder = candidates.cache.folder if candidates else None
    with shelf(economy.on_disk, folder) as kept:
        hidden: Activations | None = None
        if runner and calibration is not None:
            runner = runner.running(economy.tokens)
            hidden = kept.keep("start", runner.starting(calibration), len(calibration))
        gradients, slopes = _passes(runner, calibration, words, kept)
        look.gather(measures, prepared, base, kept, progress)
        views = Views(prepared, runner, of_blocks, kept, look.told)
        for number, block in enumerate(blocks):
            layers = [x for x in found.layers.values() if x.block == block or blocks == [""]]
            seen = None
            if runner and hidden is not None:
                apart = economy.input_by_input
                seen = Seen(runner, block, layers, words, hidden, apart, gradients, slopes)
            # What it sees is let go of by itself, input by input.
            coded = {} if seen is None else look.learned(layers, replace(seen))
            norms: dict[str, Any] = {}
            for group in by_input(layers).values():
                if seen is not None and per_layer:
                    norms |= dict.fromkeys((one.name for one in group), seen.of(group)["norm"])
                look.at(group, seen, coded, records)
            del seen  # before activations are carried on
            after = None
            if runner and hidden is not None and (of_blocks or block != blocks[-1]):
                # What a measure compares with what comes out may not be overwritten.
                into = None if of_blocks else hidden
                parts = runner.carry(block, hidden, {})
                after = kept.keep(f"after-{number % 2}", parts, len(hidden), into)
            view = views.at(number, block, layers, norms, hidden, after)
            look.through(view, of_blocks, records)
            hidden = after
            progress.step(block)
    answered = look.spared(records)
    about = _about(measures, answered, found)
    return Survey(levels, look.losses, answered, about, look.refused)


def _about(
    measures: Sequence[catalogue.Method], records: Mapping[str, Records], found: Structure
) -> dict[str, Mapping[str, float]]:
    """What measures say of the whole model."""
    made: dict[str, Mapping[str, float]] = {}
    for method in measures:
        if method.across is None or not records.get(method.name):
            continue
        layers = found.layers.items()
        of = {one.block if method.unit == "block" else name: name for name, one in layers}
        seen = [records[method.name][name] for name in of.values() if name in records[method.name]]
        made[method.name] = method.across(seen)
    return made


def _passes(
    runner: Runner | None, calibration: Tensor | None, words: frozenset[str], kept: Shelf
) -> tuple[WeightGradients | None, WeightSlopes | None]:
    """What shows how the loss moves with weights, as far as it is asked for."""
    if runner is None or calibration is None:
        return None, None
    gradients = WeightGradients(runner, calibration, kept) if GRAD in words else None
    return gradients, WeightSlopes(runner, calibration) if SLOPES in words else None


def _check(prepared: Prepared, methods: Sequence[catalogue.Method]) -> None:
    needy = [m.id for m in methods if m.calibrated]
    if needy and prepared.calibration is None:
        raise UserError(
            f"{needy[0]} reads what only a calibration text can show.",
            "Add --calibration TEXT (a text file, a JSON list of strings, or `builtin`).",
        )
    for method in methods:
        if problem := running_in_blocks(prepared, method):
            raise UserError(problem, "Use a measure of layers, such as error or weight_error.")


def running_in_blocks(prepared: Prepared, method: catalogue.Method) -> str:
    """Why a measure of blocks cannot be had of a model that runs as a whole; "" if it can."""
    of_blocks = method.verb == "measure" and method.unit == "block"
    reads = method.calibrated or method.labelled
    if of_blocks and reads and prepared.runner and prepared.runner.whole:
        return (
            f"{method.id} looks at what a block sees, and {prepared.source.label} runs as a whole, "
            "not block by block."
        )
    return ""


def _check_base(measures: Sequence[catalogue.Method], base: Source | None) -> None:
    needy = [method.id for method in measures if PAIRED.intersection(method.evidence)]
    if needy and base is None:
        raise UserError(
            f"{needy[0]} compares a model with another, and there is none.",
            "Give one: `layerwise inspect MODEL --against BASE`.",
        )


def known_losses(
    found: Structure,
    levels: Mapping[str, Sequence[LayerPlan]],
    options: Options,
    candidates: Candidates | None,
) -> dict[str, Losses]:
    """What is kept of the losses at some levels, by layer."""
    if candidates is None:
        return {}
    kept = {
        name: candidates.losses(found.layers[name], plans, options)
        for name, plans in levels.items()
    }
    return {name: losses for name, losses in kept.items() if losses is not None}


def missing(
    known: Mapping[str, Losses], levels: Mapping[str, Sequence[LayerPlan]]
) -> dict[str, list[LayerPlan]]:
    """The levels whose losses are not known, by layer; no layer of which all are."""
    left = {name: _missing(known.get(name), plans) for name, plans in levels.items()}
    return {name: works for name, works in left.items() if works}


def _missing(losses: Losses | None, plans: Sequence[LayerPlan]) -> list[LayerPlan]:
    """The plans whose losses are not known, each once and without its reasons."""
    works = dict.fromkeys(plan.work for plan in plans)
    return [work for work in works if losses is None or work not in losses.lost]


@dataclass(frozen=True)
class _Look:
    """What is to be found out about layers, and what is known of them by now."""

    source: Source
    levels: Mapping[str, Sequence[LayerPlan]]
    options: Options
    measures: Sequence[catalogue.Method]
    candidates: Candidates | None
    known: Mapping[str, Losses]
    lenient: bool
    told: dict[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    losses: dict[str, Losses] = field(default_factory=dict[str, Losses])
    refused: dict[str, str] = field(default_factory=dict[str, str])

    @contextlib.contextmanager
    def sparing(self, method: catalogue.Method) -> Generator[None]:
        """Where a measure is at work: what it refuses ends it, or the survey."""
        try:
            yield
        except UserError as error:
            if not self.lenient:
                raise
            self.refused.setdefault(method.name, error.problem)

    def gather(
        self,
        measures: Sequence[catalogue.Method],
        prepared: Prepared,
        base: Source | None,
        kept: Shelf,
        progress: Progress,
    ) -> None:
        """Gather what measures read that the walk does not show."""
        for method in measures:
            words = BEFOREHAND.intersection(method.evidence) - self.told.keys()
            with self.sparing(method):
                self.told.update(evidence_for(words, prepared, base, kept, progress))

    def through(
        self,
        view: View,
        measures: Sequence[catalogue.Method],
        records: Mapping[str, dict[str, Mapping[str, float]]],
    ) -> None:
        """Look at a block with the measures of blocks."""
        names = [layer.name for layer in view.layers]
        for method in measures:
            if method.name in self.refused:
                continue
            with self.sparing(method):
                answer = method.run(**view.of(method), **self.options.get(method.id, {}))
                records[method.name].update(dict.fromkeys(names, record(answer)))

    def spared(self, records: Mapping[str, Records]) -> dict[str, Records]:
        """What measures answered that refused no layer."""
        return {name: found for name, found in records.items() if name not in self.refused}

    def words(self) -> frozenset[str]:
        """The evidence of calibration that it takes: an error is one of the layer's output."""
        gram = frozenset({"gram"}) if any(self.levels.values()) else frozenset[str]()
        tried = words_of(plan for plans in self.levels.values() for plan in plans)
        return calibrated_words(self.measures) - BEFOREHAND | tried | gram

    def learned(self, layers: Sequence[Layer], seen: Seen) -> Learnt:
        """The codes of a block's layers that are learned together, at each level that needs it."""
        asked = missing(self.known, {one.name: self.levels.get(one.name, ()) for one in layers})
        works = {replace(work, rank=0) for works in asked.values() for work in works if work.joint}
        members = [one for one in layers if not alone(one, whole=seen.runner.whole)]
        hidden = seen.carried()
        if not works or not members or hidden is None:
            return {}
        evidence = {reads: seen.of(group) for reads, group in by_input(members).items()}
        weights = [weight_of(self.source, layer) for layer in members]
        return {
            work: learned_together(
                seen.runner,
                seen.block,
                members,
                weights,
                [evidence[layer.reads] for layer in members],
                [work] * len(members),
                self.options,
                inputs=hidden[:],
                targets=seen.runner.forward(seen.block, hidden[:], {}),
                changed={},
            )
            for work in works
        }

    def at(
        self,
        group: Sequence[Layer],
        seen: Seen | None,
        coded: Learnt,
        records: Mapping[str, dict[str, Mapping[str, float]]],
    ) -> None:
        """Look at layers that read one input, unless all is known of them."""
        asked = {one.name: self.levels.get(one.name, ()) for one in group}
        if not self.measures and not missing(self.known, asked):
            self.losses.update({n: self.known[n] for n in asked if n in self.known})
            return
        evidence = {} if seen is None else seen.of(group)
        weights = [weight_of(self.source, layer) for layer in group]
        trial = Trial(group, weights, evidence, self.options, coded, self.told)
        for method in self.measures:
            if method.name in self.refused:
                continue
            with self.sparing(method):
                records[method.name].update(trial.records(method, self.levels))
        self.losses.update(trial.losses(self.levels, self.known, self.candidates))


@dataclass(frozen=True)
class Trial:
    """Layers that read one input, their weights, and what was seen of the input."""

    group: Sequence[Layer]
    weights: Sequence[Tensor]
    evidence: Mapping[str, Any]
    options: Options
    coded: Learnt = field(default_factory=dict[LayerPlan, Mapping[str, Coded]])
    told: Told = field(default_factory=dict[str, Mapping[str, Any]])
    made: Made = field(default_factory=dict[tuple[Any, ...], list[Any]])

    def losses(
        self,
        levels: Mapping[str, Sequence[LayerPlan]],
        known: Mapping[str, Losses],
        candidates: Candidates | None,
    ) -> dict[str, Losses]:
        """What each level costs each layer; what was not known is made, and kept."""
        found = {one.name: known[one.name] for one in self.group if one.name in known}
        asked = {
            one.name: _missing(found.get(one.name), levels.get(one.name, ())) for one in self.group
        }
        works = {work for plans in asked.values() for work in plans}
        for work in self._in_order(works):
            members = [n for n, one in enumerate(self.group) if work in asked[one.name]]
            for done in self._transformed(members, [work] * len(members)):
                found[done.layer.name] = Losses.of(done).joined(found.get(done.layer.name))
                if candidates is not None:
                    candidates.keep(done, self.options)
        if candidates is not None:
            for layer in self.group:
                if asked[layer.name]:
                    candidates.keep_losses(layer, found[layer.name], self.options)
        return found

    def _in_order(self, works: Iterable[LayerPlan]) -> Iterator[LayerPlan]:
        """Levels that share steps together, higher ranks first, each shared step made once."""
        ordered = sorted(
            works, key=lambda one: (-one.density, one.pruner, one.method, one.bits or 0, -one.rank)
        )
        before: LayerPlan | None = None
        for work in ordered:
            shared = 0 if before is None else _shared_steps(before, work)
            for path in [path for path in self.made if len(path) > 1 + shared]:
                del self.made[path]
            yield work
            before = work

    def _transformed(self, members: Sequence[int], plans: Sequence[LayerPlan]) -> list[Transformed]:
        group = [self.group[n] for n in members]
        weights = [self.weights[n] for n in members]
        coded = self.coded.get(replace(plans[0], rank=0))
        return transform(group, weights, self.evidence, plans, self.options, self.made, coded)

    def records(
        self, method: catalogue.Method, levels: Mapping[str, Sequence[LayerPlan]]
    ) -> dict[str, Mapping[str, float]]:
        """A measure of each layer."""
        given: dict[str, Any] = {
            word: self.evidence[word] for word in method.evidence if word in self.evidence
        }
        records: dict[str, Mapping[str, float]] = {}
        made: list[Transformed] = []
        if "approximation" in method.evidence:
            first = [levels[layer.name][0] for layer in self.group]
            made = self._transformed(range(len(first)), first)
        for number, (layer, weight) in enumerate(zip(self.group, self.weights, strict=True)):
            own = dict(of_layer(given, layer.name))
            own |= {w: self.told[w][layer.name] for w in method.evidence if w in self.told}
            if "weight" in method.evidence:
                own["weight"] = weight
            if "approximation" in method.evidence:
                own["approximation"] = made[number].weight
            records[layer.name] = record(method.run(**own, **self.options.get(method.id, {})))
        return records


def _shared_steps(one: LayerPlan, other: LayerPlan) -> int:
    """How many of their first steps two plans have in common, whatever the rank of the last."""
    steps = [replace(plan, rank=0).steps for plan in (one, other)]
    same = 0
    while same < min(map(len, steps)) and steps[0][same] == steps[1][same]:
        same += 1
    ranked = same == len(steps[0]) == len(steps[1]) and bool(one.rank and other.rank)
    return same + ranked


def for_layer(level: LayerPlan, layer: Layer) -> LayerPlan:
    """A level as a plan of one layer: its method if that can be used there, or plain rounding."""
    if level.bits is None or layer.feeder or not level.quantizer.must_fold:
        return level
    reason = f"rtn: nothing that feeds it can take {level.method} scales"
    return replace(
        level, method="rtn", dense=False, why="; ".join(filter(None, (level.why, reason)))
    )


def settled(
    levels: Sequence[LayerPlan], item: Sequence[Layer], source: Source, options: Options
) -> list[LayerPlan]:
    """Levels with what their quantizers settle of them by the weights of layers that share one.

    The layers are one matrix to a quantizer, as they are to a server; where they read inputs of
    several widths they are none, and nothing is settled.
    """
    known: dict[LayerPlan, Mapping[str, Any]] = {}
    made: list[LayerPlan] = []
    alike = len({layer.width for layer in item}) == 1
    for level in levels:
        method = level.quantizer
        if level.bits is None or method.settles is None:
            made.append(level)
            continue
        grid = LayerPlan(level.bits, level.group, level.symmetric, level.method)
        if grid not in known and alike:
            weight = torch.cat([layer.read(source).float() for layer in item])  # (rows, in)
            given = {"group": level.group or weight.shape[1], "symmetric": level.symmetric}
            own = options.get(method.id, {})
            check_options(method.id, own)
            known[grid] = method.settles(weight, bits=level.bits, **given, **own)
        found = known.get(grid, {"why": f"group {level.group}, for layers of several widths"})
        why = "; ".join(filter(None, (level.why, found.get("why", ""))))
        made.append(replace(level, **{**found, "why": why}))
    return made


def everywhere(
    level: LayerPlan, found: Structure, source: Source, options: Options
) -> dict[str, LayerPlan]:
    """One level as the plan of every layer, by name."""
    made: dict[str, LayerPlan] = {}
    for item in found.items():
        (one,) = settled([level], item, source, options)
        made |= {layer.name: for_layer(one, layer) for layer in item}
    return {name: made[name] for name in found.layers}
