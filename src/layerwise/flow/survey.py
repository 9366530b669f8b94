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
from layerwise.core.structure import Layer, Structure, by_input
from layerwise.core.walk import gather


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
    running = [m.id for m in of_blocks if m.needs == "calibration"]
    if running and runner and runner.whole:
        raise UserError(
            f"{running[0]} compares what goes into a block with what comes out, and "
            f"{source.label} runs as a whole, not block by block.",
            "Use a measure of layers, such as error or weight_error.",
        )
    words = calibrated_words([*tried, *of_layers]) | ({"gram"} if levels else frozenset[str]())
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
            evidence = gather(runner, block, layers, words, hidden)
            after = runner.forward(block, hidden, {})
        weights = {layer.name: _weight(source, layer) for layer in layers}
        for method in of_blocks:
            given = _block_evidence(method, list(weights.values()), hidden, after)
            value = float(method.run(**given))
            scores[method.name] |= dict.fromkeys(weights, value)
        for reads, group in by_input(layers).items():
            seen = evidence.get(reads, {})
            chosen = [weights[layer.name] for layer in group]
            lost, first = _errors(group, chosen, seen, levels, options)
            errors |= lost
            for method in of_layers:
                scores[method.name] |= _scores(method, group, chosen, seen, first)
        hidden = after
        progress.step(block)
    return Survey(errors, scores)


def _weight(source: Source, layer: Layer) -> Tensor:
    weight = layer.matrix(source.read(layer.tensor)).to(torch.float32, copy=True).contiguous()
    check_finite(layer.tensor, weight)
    return weight


def _errors(
    group: Sequence[Layer],
    weights: Sequence[Tensor],
    evidence: Mapping[str, Any],
    levels: Sequence[LayerPlan],
    options: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, list[float]], list[Tensor]]:
    """The error of each layer at each level, and what the first level makes of each weight."""
    errors: dict[str, list[float]] = {layer.name: [] for layer in group}
    first: list[Tensor] = []
    for number, level in enumerate(levels):
        plans = [for_layer(level, layer) for layer in group]
        done = transform(group, weights, evidence, plans, options)
        for one in done:
            errors[one.layer.name].append(one.error)
        if not number:
            first = [one.weight for one in done]
    return errors, first


def _scores(
    method: catalogue.Method,
    group: Sequence[Layer],
    weights: Sequence[Tensor],
    evidence: Mapping[str, Any],
    first: Sequence[Tensor],
) -> dict[str, float]:
    given: dict[str, Any] = {word: evidence[word] for word in method.evidence if word in evidence}
    scores: dict[str, float] = {}
    for number, (layer, weight) in enumerate(zip(group, weights, strict=True)):
        if "weight" in method.evidence:
            given["weight"] = weight
        if "approximation" in method.evidence:
            given["approximation"] = first[number]
        scores[layer.name] = float(method.run(**given))
    return scores


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
