"""From a wish (bits, or a budget) to a plan: who gets how much, and why."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from layerwise.core import catalogue
from layerwise.core.checkpoint import Source
from layerwise.core.errors import UserError
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.progress import Progress
from layerwise.core.runner import Runner
from layerwise.core.structure import Layer, Structure
from layerwise.flow.survey import Survey, for_layer, survey

LEVELS = (2, 3, 4, 8)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asked for; a plan comes of it.

    Attributes:
        bits: Width of every layer; None when a budget decides, or nothing is quantized.
        budget: "3.5bits" stored per weight, "40%" of the files, or "1.2GiB" of them.
        levels: Widths that a budget may choose among.
        group: Inputs that share a grid; 0 is the whole row.
        symmetric: No zero points.
        method: Quantizer.
        density: Fraction of weights kept.
        pruner: Pruner.
        rank: Columns of a low-rank correction.
        compensator: Compensator.
        allocate: Allocator.
        measure: Measure that an allocator by scores goes by.
        format: How the output is stored.
        options: Options of methods, by id.
    """

    bits: int | None = None
    budget: str = ""
    levels: Sequence[int] = LEVELS
    group: int = 128
    symmetric: bool = False
    method: str = "rtn"
    density: float = 1.0
    pruner: str = "magnitude"
    rank: int = 0
    compensator: str = "svd"
    allocate: str = "knapsack"
    measure: str = "lim"
    format: str = "dense"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])

    def level(self, bits: int | None) -> LayerPlan:
        """The plan of a layer at a width."""
        return LayerPlan(
            bits,
            self.group,
            self.symmetric,
            self.method,
            self.density,
            self.pruner,
            self.rank,
            self.compensator,
        )

    def methods(self) -> list[catalogue.Method]:
        """Every method it names, so that a misspelt one is refused at once."""
        level = self.level(self.bits if self.bits is not None else (4 if self.budget else None))
        used = [catalogue.get(id) for id, _ in level.steps]
        if self.budget:
            used.append(catalogue.get(f"allocate/{self.allocate}"))
            if "scores" in used[-1].evidence:
                used.append(catalogue.get(f"measure/{self.measure}"))
        return used


def make_plan(
    source: Source,
    found: Structure,
    wish: Wish,
    runner: Runner | None,
    calibration: torch.Tensor | None,
    progress: Progress,
) -> Plan:
    """Turn a wish into a plan.

    Raises:
        UserError: The wish asks for nothing, or for less than the lowest levels take.
    """
    if not wish.budget:
        even = wish.level(wish.bits)
        why = "the same for every layer"
        layers = {
            name: _with_reason(for_layer(even, layer), why) for name, layer in found.layers.items()
        }
        return Plan(layers, wish.format, wish.options)
    return _allocated(source, found, wish, runner, calibration, progress)


def _allocated(
    source: Source,
    found: Structure,
    wish: Wish,
    runner: Runner | None,
    calibration: torch.Tensor | None,
    progress: Progress,
) -> Plan:
    allocator = catalogue.get(f"allocate/{wish.allocate}")
    levels = [wish.level(bits) for bits in sorted(wish.levels)]
    measures = [catalogue.get(f"measure/{wish.measure}")] if "scores" in allocator.evidence else []
    tried = levels if "errors" in allocator.evidence else []
    looked = Survey({}, {})
    if tried or measures:
        looked = survey(
            source,
            found,
            runner,
            calibration,
            levels=tried,
            options=wish.options,
            measures=measures,
            progress=progress,
        )
    items = found.items()
    costs = [torch.tensor([_item_bytes(item, level, source) for level in levels]) for item in items]
    evidence: dict[str, Any] = {"costs": costs}
    if tried:
        evidence["errors"] = [
            torch.tensor(
                [sum(_damage(looked, layer, n) for layer in item) for n in range(len(levels))],
                dtype=torch.float64,
            )
            for item in items
        ]
    if measures:
        scores = looked.scores[measures[0].name]
        evidence["scores"] = torch.tensor([scores[item[0].name] for item in items])
    if "weights" in allocator.evidence:
        evidence["weights"] = [_item_weight(source, item) for item in items]
    budget = budget_bytes(wish.budget, source, found)
    given = {word: evidence[word] for word in allocator.evidence}
    chosen = allocator.run(**given, budget=budget)
    layers: dict[str, LayerPlan] = {}
    for number, item in enumerate(items):
        level = levels[int(chosen[number])]
        for layer in item:
            why = _why(layer, level, looked, levels, int(chosen[number]), allocator, measures)
            layers[layer.name] = _with_reason(for_layer(level, layer), why)
    ordered = {name: layers[name] for name in found.layers}
    return Plan(ordered, wish.format, wish.options, wish.budget)


def budget_bytes(budget: str, source: Source, found: Structure) -> int:
    """What a budget leaves for the planned layers, in bytes.

    "3.5bits" counts everything stored for the planned layers, scales and zero points included;
    "40%" and "1.2GiB" are of the whole files, of which what is left alone takes its part first.

    Raises:
        UserError: It is not written as one of these.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(bits?|%|[KMG]?i?B)\s*", budget)
    unit = match[2] if match else ""
    if not match or (unit not in _UNITS and not unit.startswith(("bit", "%"))):
        raise UserError(
            f"{budget!r} is not a budget.", "Write it as 3.5bits, 40% or 1.2GiB (also MB, GB, MiB)."
        )
    amount = float(match[1])
    if unit.startswith("bit"):
        return int(amount * sum(layer.count for layer in found.layers.values()) / 8)
    everything = sum(info.size for info in source.tensors.values())
    alone = sum(source.tensors[name].size for name in found.left)
    wanted = everything * amount / 100 if unit == "%" else amount * _UNITS[unit]
    if wanted < alone:
        raise UserError(
            f"a budget of {budget} is {wanted / 1e6:.2f} MB, but what is left alone (embeddings, "
            f"norms, head) takes {alone / 1e6:.2f} MB.",
            f"Give more than {100 * alone / everything:.0f}%.",
        )
    return int(wanted - alone)


def _item_bytes(item: Sequence[Layer], level: LayerPlan, source: Source) -> int:
    bits = sum(
        level.stored_bits(layer, source.tensors[layer.tensor].dtype.itemsize * 8) * layer.count
        for layer in item
    )
    return -int(-bits // 8)


def _damage(looked: Survey, layer: Layer, level: int) -> float:
    return looked.errors[layer.name][level]


def _item_weight(source: Source, item: Sequence[Layer]) -> torch.Tensor:
    return torch.cat([layer.matrix(source.read(layer.tensor)).flatten().float() for layer in item])


def _with_reason(plan: LayerPlan, why: str) -> LayerPlan:
    return replace(plan, why="; ".join(part for part in (why, plan.why) if part))


def _why(
    layer: Layer,
    level: LayerPlan,
    looked: Survey,
    levels: Sequence[LayerPlan],
    chosen: int,
    allocator: catalogue.Method,
    measures: Sequence[catalogue.Method],
) -> str:
    if measures:
        score = looked.scores[measures[0].name][layer.name]
        return f"{measures[0].name} {score:.3g} ranks it for {level.bits} bits"
    if not looked.errors:
        return f"{allocator.name} gives it {level.bits} bits"
    errors = looked.errors[layer.name]
    told = f"loses {errors[chosen]:.2%} at {level.bits} bits"
    if chosen:
        told += f", {errors[chosen - 1]:.2%} at {levels[chosen - 1].bits}"
    if chosen + 1 < len(levels):
        told += f"; {levels[chosen + 1].bits} would save {errors[chosen] - errors[chosen + 1]:.2%}"
    return told
