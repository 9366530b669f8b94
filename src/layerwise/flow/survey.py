"""Look at every layer of a model without changing it: scores, and the error at each level."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from layerwise.core import catalogue
from layerwise.core.apply import check_finite, transform
from layerwise.core.checkpoint import Source
from layerwise.core.errors import UserError
from layerwise.core.evidence import calibrated_words
from layerwise.core.plan import LayerPlan
from layerwise.core.progress import Progress
from layerwise.core.runner import Runner
from layerwise.core.structure import Layer, Structure
from layerwise.core.walk import gather

BLOCK_WORDS = frozenset({"inputs", "outputs"})


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found.

    Attributes:
        errors: Error of each layer at each level that was tried, in the order of the levels.
        scores: Score of each layer, by measure and then by layer.
    """

    errors: Mapping[str, list[float]]
    scores: Mapping[str, Mapping[str, float]]


def survey(
    source: Source,
    found: Structure,
    runner: Runner | None,
    calibration: Tensor | None,
    *,
    levels: Sequence[LayerPlan],
    options: Mapping[str, Mapping[str, Any]],
    measures: Sequence[catalogue.Method],
    progress: Progress,
) -> Survey:
    """Score every layer, and try every level on it.

    Args:
        source: The model's weights.
        found: Its structure.
        runner: Runs it; None for weight-only work.
        calibration: Token ids, (windows, length); None for weight-only work.
        levels: Plans to try on each layer, cheapest first.
        options: Options of methods, by id.
        measures: Measures of a layer or a block; those that read an approximation see the first
            level.
        progress: Is told of each block.

    Raises:
        UserError: A method needs calibration and there is none.
    """
    tried = [catalogue.get(id) for level in levels for id, _ in level.steps]
    needy = [m.id for m in [*tried, *measures] if m.needs == "calibration"]
    if needy and calibration is None:
        raise UserError(
            f"{needy[0]} reads what only a calibration text can show.",
            "Add --calibration TEXT (a text file, a JSON list of strings, or `builtin`).",
        )
    of_layers = [m for m in measures if m.unit == "layer"]
    of_blocks = [m for m in measures if m.unit == "block"]
    words = calibrated_words([*tried, *of_layers])
    runs = runner is not None and calibration is not None
    blocks = runner.blocks if runner and runs else found.blocks
    progress.stage("measure", len(blocks))
    hidden = runner.start(calibration) if runner and calibration is not None else None
    errors: dict[str, list[float]] = {}
    scores: dict[str, dict[str, float]] = {m.name: {} for m in measures}
    for block in blocks:
        layers = [x for x in found.layers.values() if x.block == block or blocks == [""]]
        after = None
        evidence: Mapping[str, Mapping[str, Any]] = {}
        if runner and hidden is not None:
            evidence = gather(runner, block, layers, words | {"gram"}, hidden)
            after = runner.forward(block, hidden, {})
        weights = {layer.name: _weight(source, layer) for layer in layers}
        for method in of_blocks:
            given = _block_evidence(method, list(weights.values()), hidden, after)
            value = float(method.run(**given))
            scores[method.name] |= dict.fromkeys(weights, value)
        groups: dict[str, list[Layer]] = {}
        for layer in layers:
            groups.setdefault(layer.reads, []).append(layer)
        for reads, group in groups.items():
            seen = evidence.get(reads, {})
            chosen = [weights[layer.name] for layer in group]
            found_errors = _errors(group, chosen, seen, levels, options)
            errors |= found_errors
            for method in of_layers:
                _score(method, group, chosen, seen, levels, options, scores[method.name])
        hidden = after
        progress.step(block)
    return Survey(errors, scores)


def _weight(source: Source, layer: Layer) -> Tensor:
    weight = layer.matrix(source.read(layer.tensor)).to(torch.float32, copy=True).contiguous()
    check_finite(layer.name, weight)
    return weight


def _errors(
    group: Sequence[Layer],
    weights: Sequence[Tensor],
    evidence: Mapping[str, Any],
    levels: Sequence[LayerPlan],
    options: Mapping[str, Mapping[str, Any]],
) -> dict[str, list[float]]:
    errors: dict[str, list[float]] = {layer.name: [] for layer in group}
    for level in levels:
        plans = [for_layer(level, layer) for layer in group]
        for done in transform(group, weights, evidence, plans, options):
            errors[done.layer.name].append(done.error)
    return errors


def _score(
    method: catalogue.Method,
    group: Sequence[Layer],
    weights: Sequence[Tensor],
    evidence: Mapping[str, Any],
    levels: Sequence[LayerPlan],
    options: Mapping[str, Mapping[str, Any]],
    scores: dict[str, float],
) -> None:
    given: dict[str, Any] = {word: evidence[word] for word in method.evidence if word in evidence}
    plans = [for_layer(levels[0], layer) for layer in group] if levels else []
    for number, (layer, weight) in enumerate(zip(group, weights, strict=True)):
        if "weight" in method.evidence:
            given["weight"] = weight
        if "approximation" in method.evidence:
            done = transform([layer], [weight], evidence, [plans[number]], options)
            given["approximation"] = done[0].weight
        scores[layer.name] = float(method.run(**given))


def for_layer(level: LayerPlan, layer: Layer) -> LayerPlan:
    """A level as a plan of one layer: its method if that can be used there, or plain rounding."""
    if level.bits is None or catalogue.get(f"quantize/{level.method}").rows != "input":
        return level
    if layer.feeder:
        return level
    reason = f"rtn: nothing that feeds it can take {level.method} scales"
    return replace(level, method="rtn", why="; ".join(filter(None, (level.why, reason))))


def _block_evidence(
    method: catalogue.Method, weights: list[Tensor], hidden: Tensor | None, after: Tensor | None
) -> dict[str, Any]:
    made: dict[str, Any] = {"weights": weights}
    if hidden is not None and after is not None:
        made["inputs"] = hidden.flatten(0, -2)
        made["outputs"] = after.flatten(0, -2)
    return {word: made[word] for word in method.evidence}
