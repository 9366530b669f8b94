"""One plan, one layer: run its methods in order on the evidence there is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core import catalogue
from layerwise.core.activation import Activation, static
from layerwise.core.errors import UserError
from layerwise.core.plan import LayerPlan
from layerwise.core.reading.structure import Layer
from layerwise.core.results import Coded, LowRank, Pruned, Quantized
from layerwise.core.running.evidence import GRAD, of_layer
from layerwise.core.symmetric import squared_lengths

# What methods returned for some layers, by the layers' names followed by the steps so far.
Made = dict[tuple[Any, ...], list[Any]]


@dataclass(frozen=True, slots=True)
class Transformed:
    """What became of a layer.

    Attributes:
        layer: The layer.
        plan: What was asked for.
        weight: What now multiplies the layer's input, before any fold; float32.
        base: The same without the correction.
        quantized: Its codes, if it was quantized; pruned entries stand for 0.0.
        activation: How its input is rounded when the model runs; None leaves it.
        kept: Its mask, if it was pruned.
        low_rank: Its correction, included in `weight`.
        lost: Energy of each output that is lost; of its weights, where no input was seen.
        energy: Energy of each output before.
        notes: What its methods want known.
    """

    layer: Layer
    plan: LayerPlan
    weight: Float[Tensor, "out in"]
    base: Float[Tensor, "out in"]
    quantized: Coded | None
    activation: Activation | None
    kept: Bool[Tensor, "out in"] | None
    low_rank: LowRank | None
    lost: Float[Tensor, " out"]
    energy: Float[Tensor, " out"]
    notes: tuple[str, ...]

    @property
    def error(self) -> float:
        """Share of the energy that is lost; a layer of zeros has error 0."""
        return lost_share(float(self.lost.sum()), float(self.energy.sum()))

    @property
    def input_scale(self) -> Float[Tensor, " in"] | None:
        """What the layer's feeder must be divided by."""
        return None if self.quantized is None else self.quantized.input_scale

    @property
    def grid(self) -> Quantized | None:
        """Its codes as a format stores them that knows no others; None if it stores none."""
        made = self.quantized
        return made if self.plan.coded and isinstance(made, Quantized) else None

    @property
    def stored(self) -> Float[Tensor, "out in"]:
        """`base` as it multiplies an input whose scales went into the feeder."""
        return self.base if self.input_scale is None else self.base * self.input_scale


def lost_share(lost: float, energy: float) -> float:
    """The share of an energy that is lost; nothing is lost of none."""
    return lost / energy if energy > 0 else 0.0


def check_finite(tensor: str, weight: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        UserError: The weight has some; the message counts them.
    """
    # One sum is cheaper than looking at every entry, and NaN or infinity never fails to spoil it.
    if not torch.isfinite(weight.sum()):
        bad = int((~torch.isfinite(weight)).sum())
        if bad:
            raise UserError(
                f"{tensor} holds NaN or infinity ({bad} of {weight.numel()} entries).",
                "The checkpoint is damaged or its training diverged: use another one.",
            )


def transform(
    layers: Sequence[Layer],
    weights: Sequence[Float[Tensor, "_ in"]],
    evidence: Mapping[str, Any],
    plans: Sequence[LayerPlan],
    options: Mapping[str, Mapping[str, Any]],
    made: Made | None = None,
    coded: Mapping[str, Coded] | None = None,
) -> list[Transformed]:
    """Transform layers that read the same input.

    Layers with the same plan are stacked by rows for methods that allow it, so that one Gram
    matrix is factored once for all of them.

    Args:
        layers: The layers.
        weights: Their weights, float32.
        evidence: What calibration saw of their input; empty for weight-only work.
        plans: One plan for each.
        options: Options of methods, by method id.
        made: What methods made of these layers before, to be used again and added to.
        coded: Codes that were learned together with those of other layers, by layer.

    Raises:
        UserError: A weight is not finite, or a method reads evidence that is not there.
    """
    for layer, weight in zip(layers, weights, strict=True):
        check_finite(layer.tensor, weight)
    alike: dict[LayerPlan, list[int]] = {}
    for number, plan in enumerate(plans):
        alike.setdefault(plan.work, []).append(number)
    done: dict[int, Transformed] = {}
    for numbers in alike.values():
        chosen = [weights[n] for n in numbers]
        given = [layers[n] for n in numbers]
        parts = _run_steps(given, chosen, evidence, plans[numbers[0]], options, made, coded or {})
        for number, part in zip(numbers, parts, strict=True):
            done[number] = _finished(layers[number], plans[number], weights[number], part, evidence)
    return [done[number] for number in range(len(layers))]


@dataclass
class _Part:
    weight: Tensor
    base: Tensor | None = None
    kept: Tensor | None = None
    quantized: Coded | None = None
    low_rank: LowRank | None = None
    notes: tuple[str, ...] = ()


def _run_steps(
    layers: Sequence[Layer],
    weights: Sequence[Tensor],
    evidence: Mapping[str, Any],
    plan: LayerPlan,
    options: Mapping[str, Mapping[str, Any]],
    made: Made | None,
    coded: Mapping[str, Coded],
) -> list[_Part]:
    parts = [_Part(weight.clone() if not plan.steps else weight) for weight in weights]
    names = [layer.name for layer in layers]
    made, path = {} if made is None else made, (tuple(names),)
    for id, fixed in plan.steps:
        method = catalogue.get(id)
        given = dict(options.get(id, {})) | fixed
        if given.get("group") == 0:
            given["group"] = weights[0].shape[1]
        if "fold" in method.options:
            given["fold"] = bool(layers[0].feeder)
        rank = given.get("rank", 0) if method.nested else 0
        told = tuple(sorted(item for item in given.items() if not (rank and item[0] == "rank")))
        path = (*path, (id, told))
        if method.verb == "quantize" and all(name in coded for name in names):
            made[path] = [coded[name] for name in names]
        if path not in made or (rank and made[path][0].rank < rank):
            made[path] = _run(method, names, weights, parts, evidence, given)
        results = [one.truncated(rank) for one in made[path]] if rank else made[path]
        for part, result in zip(parts, results, strict=True):
            part.notes += result.notes
            if isinstance(result, Pruned):
                part.kept, part.weight = result.kept, result.weight
            elif isinstance(result, Coded):
                if part.kept is not None and isinstance(result, Quantized):
                    result = result.masked(part.kept)  # noqa: PLW2901
                part.quantized = result
                part.weight = part.quantized.dequantize()
            else:
                part.low_rank, part.base = result, part.weight
                part.weight = part.weight + result.product()
    return parts


def _run(
    method: catalogue.Method,
    names: Sequence[str],
    originals: Sequence[Tensor],
    parts: Sequence[_Part],
    evidence: Mapping[str, Any],
    options: Mapping[str, Any],
) -> list[Any]:
    missing = [
        word
        for word in method.evidence
        if word not in ("weight", "approximation") and word not in evidence
    ]
    if ungathered := [
        word for word in missing if catalogue.EVIDENCE[word] not in catalogue.GATHERED
    ]:
        raise UserError(
            f"{method.id} reads {', '.join(ungathered)}, which nothing gathers here.",
            "Choose a method that needs nothing or calibration (`layerwise methods`).",
        )
    if missing:
        raise UserError(
            f"{method.id} reads {', '.join(missing)} of {names[0]}, which calibration gathers.",
            "Add --calibration TEXT (a text file, a JSON list of strings, or `builtin`).",
        )
    shared = {word: evidence[word] for word in method.evidence if word in evidence}
    seen = [of_layer(shared, name) for name in names]
    if "approximation" in method.evidence:
        return [
            method.run(**given, weight=original, approximation=part.weight, **options)
            for given, original, part in zip(seen, originals, parts, strict=True)
        ]
    if method.rows == "layer" or len(parts) == 1:
        return [
            method.run(**given, weight=part.weight, **options)
            for given, part in zip(seen, parts, strict=True)
        ]
    if GRAD in shared:
        shared[GRAD] = torch.cat([given[GRAD] for given in seen])
    stacked = method.run(**shared, weight=torch.cat([part.weight for part in parts]), **options)
    return stacked.split([len(part.weight) for part in parts])


def _finished(
    layer: Layer, plan: LayerPlan, weight: Tensor, part: _Part, evidence: Mapping[str, Any]
) -> Transformed:
    gram = evidence.get("gram")
    lost, energy = _energy(weight - part.weight, gram), _energy(weight, gram)
    if gram is not None and not energy.any():
        lost, energy = _energy(weight - part.weight, None), _energy(weight, None)
        part.notes += ("no input was seen: the error is of its weight",)
    return Transformed(
        layer=layer,
        plan=plan,
        weight=part.weight,
        base=part.weight if part.base is None else part.base,
        quantized=part.quantized,
        activation=_activation(plan, part.quantized, evidence),
        kept=part.kept,
        low_rank=part.low_rank,
        lost=lost,
        energy=energy,
        notes=part.notes,
    )


def _activation(
    plan: LayerPlan, quantized: Coded | None, evidence: Mapping[str, Any]
) -> Activation | None:
    """How the layer's input is rounded: the quantizer's way, if it has one, or the plan's."""
    if quantized is None or quantized.activation is not None or not plan.activation:
        return None if quantized is None else quantized.activation
    peak = evidence.get("peak")
    if static(plan.activation) and peak is None:
        raise UserError(
            f"activation {plan.activation} has one scale for all tokens, which only a calibration "
            "text can show.",
            "Add --calibration TEXT, or take " + plan.activation.removesuffix("-static") + ".",
        )
    if peak is not None and quantized.input_scale is not None:
        peak = peak / quantized.input_scale
    return Activation.of(plan.activation, peak)


def _energy(
    matrix: Float[Tensor, "out in"], gram: Float[Tensor, "in in"] | None
) -> Float[Tensor, " out"]:
    """Mean square of what each row answers, m G m^T; G is the identity if not given."""
    if gram is None:
        return torch.linalg.vector_norm(matrix, dim=1).square()
    return squared_lengths(matrix, gram)
