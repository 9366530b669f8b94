"""Look at every layer of a model without changing it: scores, and the error at each level."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from layerwise.core import catalogue
from layerwise.core.apply import Made, Transformed, check_finite, transform
from layerwise.core.candidates import Candidates, Losses, Options
from layerwise.core.checkpoint import Source
from layerwise.core.errors import UserError
from layerwise.core.evidence import calibrated_words
from layerwise.core.plan import LayerPlan, words_of
from layerwise.core.progress import Progress
from layerwise.core.structure import Layer, Structure, by_input
from layerwise.core.walk import gather
from layerwise.flow.preparing import Prepared


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found.

    Attributes:
        levels: Plans that were tried, by layer.
        losses: What they cost, by layer.
        scores: Score of each layer, by measure and then by layer.
    """

    levels: Mapping[str, Sequence[LayerPlan]]
    losses: Mapping[str, Losses]
    scores: Mapping[str, Mapping[str, float]]

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
    candidates: Candidates | None = None,
    progress: Progress,
) -> Survey:
    """Score every layer, and try levels on it, on what it sees in the original model.

    Args:
        prepared: The model, opened.
        levels: Plans to try, by layer.
        options: Options of methods, by id.
        measures: Measures of a layer or a block; those that read an approximation see the first
            level.
        candidates: Where what levels make of layers is kept; what is there is not made again.
        progress: Is told of each block.

    Raises:
        UserError: A method needs calibration and there is none.
    """
    found, runner = prepared.found, prepared.runner
    tried = [catalogue.get(id) for plans in levels.values() for p in plans for id, _ in p.steps]
    calibration = prepared.calibration.ids if prepared.calibration else None
    _check(prepared, [*tried, *measures])
    known = _known(found, levels, options, candidates)
    if not measures and all(
        _missing(known.get(name), plans) == [] for name, plans in levels.items()
    ):
        return Survey(levels, {name: known[name] for name in levels}, {})
    of_layers = [m for m in measures if m.unit == "layer"]
    of_blocks = [m for m in measures if m.unit == "block"]
    words = calibrated_words(of_layers) | ({"gram"} if levels else frozenset[str]())
    words |= words_of(plan for plans in levels.values() for plan in plans)
    runs = runner is not None and calibration is not None
    blocks = runner.blocks if runner and runs else found.blocks
    progress.stage("measure", len(blocks))
    hidden = runner.start(calibration) if runner and calibration is not None else None
    losses: dict[str, Losses] = {}
    scores: dict[str, dict[str, float]] = {m.name: {} for m in measures}
    for block in blocks:
        layers = [x for x in found.layers.values() if x.block == block or blocks == [""]]
        after = None
        evidence: Mapping[str, Mapping[str, Any]] = {}
        if runner and hidden is not None:
            evidence = gather(runner, block, layers, words, hidden)
            after = runner.forward(block, hidden, {})
        weights = {layer.name: _weight(prepared.source, layer) for layer in layers}
        for method in of_blocks:
            given = _block_evidence(method, list(weights.values()), hidden, after)
            value = float(method.run(**given))
            scores[method.name] |= dict.fromkeys(weights, value)
        for reads, group in by_input(layers).items():
            trial = _Trial(
                group, [weights[one.name] for one in group], evidence.get(reads, {}), options, {}
            )
            for method in of_layers:
                scores[method.name] |= trial.scores(method, levels)
            losses |= trial.losses(levels, known, candidates)
        hidden = after
        progress.step(block)
    return Survey(levels, losses, scores)


def _check(prepared: Prepared, methods: Sequence[catalogue.Method]) -> None:
    needy = [m.id for m in methods if m.needs == "calibration"]
    if needy and prepared.calibration is None:
        raise UserError(
            f"{needy[0]} reads what only a calibration text can show.",
            "Add --calibration TEXT (a text file, a JSON list of strings, or `builtin`).",
        )
    running = [m.id for m in methods if m.unit == "block" and m.needs == "calibration"]
    if running and prepared.runner and prepared.runner.whole:
        raise UserError(
            f"{running[0]} compares what goes into a block with what comes out, and "
            f"{prepared.source.label} runs as a whole, not block by block.",
            "Use a measure of layers, such as error or weight_error.",
        )


def _known(
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


def _missing(losses: Losses | None, plans: Sequence[LayerPlan]) -> list[LayerPlan]:
    """The plans whose losses are not known, each once and without its reasons."""
    works = dict.fromkeys(plan.work for plan in plans)
    return [work for work in works if losses is None or work not in losses.lost]


@dataclass(frozen=True)
class _Trial:
    """Layers that read one input, their weights, and what was seen of the input."""

    group: Sequence[Layer]
    weights: Sequence[Tensor]
    evidence: Mapping[str, Any]
    options: Options
    made: Made

    def losses(
        self,
        levels: Mapping[str, Sequence[LayerPlan]],
        known: Mapping[str, Losses],
        candidates: Candidates | None,
    ) -> dict[str, Losses]:
        """What each level costs each layer; what was not known is made, and kept."""
        found = {one.name: known[one.name] for one in self.group if one.name in known}
        missing = {
            one.name: _missing(found.get(one.name), levels.get(one.name, ())) for one in self.group
        }
        works = {work for plans in missing.values() for work in plans}
        for work in self._in_order(works):
            members = [n for n, one in enumerate(self.group) if work in missing[one.name]]
            for done in self._transformed(members, [work] * len(members)):
                found[done.layer.name] = Losses.of(done).joined(found.get(done.layer.name))
                if candidates is not None:
                    candidates.keep(done, self.options)
        if candidates is not None:
            for layer in self.group:
                if missing[layer.name]:
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
        return transform(group, weights, self.evidence, plans, self.options, self.made)

    def scores(
        self, method: catalogue.Method, levels: Mapping[str, Sequence[LayerPlan]]
    ) -> dict[str, float]:
        """A measure of each layer."""
        given: dict[str, Any] = {
            word: self.evidence[word] for word in method.evidence if word in self.evidence
        }
        scores: dict[str, float] = {}
        made: list[Transformed] = []
        if "approximation" in method.evidence:
            first = [levels[layer.name][0] for layer in self.group]
            made = self._transformed(range(len(first)), first)
        for number, (layer, weight) in enumerate(zip(self.group, self.weights, strict=True)):
            if "weight" in method.evidence:
                given["weight"] = weight
            if "approximation" in method.evidence:
                given["approximation"] = made[number].weight
            scores[layer.name] = float(method.run(**given))
        return scores


def _shared_steps(one: LayerPlan, other: LayerPlan) -> int:
    """How many of their first steps two plans have in common, whatever the rank of the last."""
    steps = [replace(plan, rank=0).steps for plan in (one, other)]
    same = 0
    while same < min(map(len, steps)) and steps[0][same] == steps[1][same]:
        same += 1
    ranked = same == len(steps[0]) == len(steps[1]) and bool(one.rank and other.rank)
    return same + ranked


def _weight(source: Source, layer: Layer) -> Tensor:
    weight = layer.matrix(source.read(layer.tensor)).to(torch.float32, copy=True).contiguous()
    check_finite(layer.tensor, weight)
    return weight


def for_layer(level: LayerPlan, layer: Layer) -> LayerPlan:
    """A level as a plan of one layer: its method if that can be used there, or plain rounding."""
    if level.bits is None or layer.feeder or not level.quantizer.must_fold:
        return level
    reason = f"rtn: nothing that feeds it can take {level.method} scales"
    return replace(
        level, method="rtn", dense=False, why="; ".join(filter(None, (level.why, reason)))
    )


def _block_evidence(
    method: catalogue.Method, weights: list[Tensor], hidden: Tensor | None, after: Tensor | None
) -> dict[str, Any]:
    made: dict[str, Any] = {"weights": weights}
    if hidden is not None and after is not None:
        made["inputs"] = hidden.flatten(0, -2)
        made["outputs"] = after.flatten(0, -2)
    return {word: made[word] for word in method.evidence}
