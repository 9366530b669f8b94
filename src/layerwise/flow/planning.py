"""From a wish (bits, or a budget) to a plan: who gets how much, and why."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_type_hints

import torch

from layerwise import export
from layerwise.core import catalogue
from layerwise.core.checkpoint import Source
from layerwise.core.errors import UserError
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.progress import Progress
from layerwise.core.structure import Layer, Structure
from layerwise.core.written import described, fits
from layerwise.flow.preparing import Prepared, check
from layerwise.flow.survey import Survey, for_layer, survey

LEVELS = (2, 3, 4, 8)
GROUPS = (128, 64, 32, 16)
# Densities between 0 and 1: few for an allocator that goes by what each does to a layer, since
# every one of them is tried; many for the others.
COARSE, FINE = 10, 1000
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asked for; a plan comes of it.

    Attributes:
        bits: Width of every layer; None when a budget decides, or nothing is quantized.
        budget: "3.5bits" stored per weight, "40%" of the files, or "1.2GiB" of them.
        levels: Widths that a budget may choose among.
        group: Inputs that share a grid; 0 is the whole row, None the largest of `GROUPS` that
            divides the width of every layer, or the row if none does, or what the format has.
        symmetric: No zero points; None for what the format takes, with zero points if it may.
        method: Quantizer.
        density: Fraction of weights kept.
        pruner: Pruner.
        rank: Columns of a low-rank correction.
        compensator: Compensator.
        allocate: Allocator; "" is knapsack for a budget, and the same density everywhere.
        measure: Measure that an allocator by scores goes by.
        format: How the output is stored.
        options: Options of methods, by id.
    """

    bits: int | None = None
    budget: str = ""
    levels: Sequence[int] = LEVELS
    group: int | None = None
    symmetric: bool | None = None
    method: str = "rtn"
    density: float = 1.0
    pruner: str = "magnitude"
    rank: int = 0
    compensator: str = "svd"
    allocate: str = ""
    measure: str = "lim"
    format: str = "dense"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])

    def __post_init__(self) -> None:
        """Refuse what is not written as it must be.

        Raises:
            UserError: It names the field.
        """
        for name, kind in get_type_hints(Wish).items():
            if not fits(given := getattr(self, name), kind):
                raise UserError(f"{name} is {given!r}.", f"Write {described(kind)}.")
        if self.budget:
            budget_amount(self.budget)
        if self.budget and self.bits is not None:
            raise UserError(
                f"bits {self.bits} and a budget of {self.budget} are asked for at once.",
                "Leave one out: a budget chooses the bits of each layer.",
            )

    def level(self, bits: int | None) -> LayerPlan:
        """The plan of a layer at a width, on the grid that its format has for it."""
        group, symmetric = export.kind(self.format).grid(bits or 0)
        return LayerPlan(
            bits,
            (group or 0) if self.group is None else self.group,
            bool(symmetric) if self.symmetric is None else self.symmetric,
            self.method,
            self.density,
            self.pruner,
            self.rank,
            self.compensator,
        )

    def fitted(self, found: Structure) -> "Wish":
        """The same with a group that fits a model, if none was asked for."""
        chosen_by_format, _ = export.kind(self.format).grid(LEVELS[0])
        if self.group is not None or chosen_by_format is not None:
            return self
        widths = {layer.width for layer in found.layers.values()}
        return replace(self, group=next((g for g in GROUPS if all(w % g == 0 for w in widths)), 0))

    def methods(self) -> list[catalogue.Method]:
        """Every method it names, so that a misspelt one is refused at once."""
        level = self.level(self.bits if self.bits is not None else (4 if self.budget else None))
        used = [catalogue.get(id) for id, _ in level.steps]
        if allocator := self.allocator():
            used.append(allocator)
            if "scores" in allocator.evidence:
                used.append(catalogue.get(f"measure/{self.measure}"))
        return used

    def allocator(self) -> catalogue.Method | None:
        """What shares out the budget, or the density; None if every layer gets the same.

        Raises:
            UserError: It cannot share out what there is to share.
        """
        if not self.budget and not self.allocate:
            return None
        method = catalogue.get(f"allocate/{self.allocate or 'knapsack'}")
        if not self.budget and self.density == 1:
            raise UserError(
                f"{method.id} has nothing to share out.",
                "Give --budget 3.5bits for widths, or --density 0.5 for densities.",
            )
        if self.budget and "weights" in method.evidence:
            raise UserError(
                f"{method.id} shares out densities, and --budget asks for widths.",
                "Give --density 0.5 without --budget, or another --allocate.",
            )
        return method


@dataclass(frozen=True, slots=True)
class _Market:
    """What an allocator chooses among.

    Attributes:
        items: Layers that must get the same level.
        levels: Plans of a layer, cheapest first.
        costs: What each level costs, one tensor per item.
        budget: What all items may cost together.
        labels: Each level in words.
    """

    items: Sequence[Sequence[Layer]]
    levels: Sequence[LayerPlan]
    costs: Sequence[torch.Tensor]
    budget: int
    labels: Sequence[str]


def make_plan(prepared: Prepared, wish: Wish, progress: Progress) -> Plan:
    """Turn a wish into a plan.

    Raises:
        UserError: The wish asks for nothing, for less than the lowest levels take, or for a level
            that `check` would refuse: all of it before any layer is looked at.
    """
    source, found = prepared.source, prepared.found
    wish = wish.fitted(found)
    allocator = wish.allocator()
    if allocator is None:
        even = replace(wish.level(wish.bits), why="the same for every layer")
        layers = {name: for_layer(even, layer) for name, layer in found.layers.items()}
        return Plan(layers, wish.format, wish.options)
    market = _widths(wish, prepared) if wish.budget else _densities(wish, prepared, allocator)
    if market.budget < (least := sum(int(cost[0]) for cost in market.costs)):
        share = 8 / sum(layer.count for layer in found.layers.values())
        given, lowest = (
            (f"{market.budget * share:.3f} bits per weight", f"{least * share:.3f}")
            if wish.budget
            else (f"{market.budget} weights", str(least))
        )
        raise UserError(
            f"the budget leaves {given} for the layers, and the lowest levels take {lowest}.",
            "Give more, or allow lower levels (--levels).",
        )
    measures = [catalogue.get(f"measure/{wish.measure}")] if "scores" in allocator.evidence else []
    comparing = any("approximation" in measure.evidence for measure in measures)
    tried = market.levels if "errors" in allocator.evidence else market.levels[: int(comparing)]
    looked = Survey({}, {})
    if tried or measures:
        looked = survey(
            source,
            found,
            prepared.runner,
            prepared.calibration.ids if prepared.calibration else None,
            levels=tried,
            options=wish.options,
            measures=measures,
            progress=progress,
        )
    evidence = _evidence(market, looked, source)
    given = {word: evidence[word]() for word in allocator.evidence}
    chosen = allocator.run(**given, budget=market.budget)
    layers = {
        layer.name: _explained(layer, market, int(level), looked, allocator)
        for item, level in zip(market.items, chosen, strict=True)
        for layer in item
    }
    ordered = {name: layers[name] for name in found.layers}
    return Plan(ordered, wish.format, wish.options, wish.budget)


def _widths(wish: Wish, prepared: Prepared) -> _Market:
    """Widths, in stored bytes; layers that a server fuses are one item."""
    found, format = prepared.found, export.get(wish.format, prepared.source)
    levels = [wish.level(bits) for bits in sorted(wish.levels)]
    overhead = max(check_level(prepared, wish, level) for level in levels)
    items = _items(wish, found, lambda layer: layer.fused)

    def size(layer: Layer, level: LayerPlan) -> int:
        info = prepared.source.tensors[layer.tensor]
        return format.size(layer, for_layer(level, layer), info)

    costs = [
        torch.tensor([sum(size(layer, level) for layer in item) for level in levels])
        for item in items
    ]
    labels = [f"{level.bits} bits" for level in levels]
    return _Market(items, levels, costs, budget_bytes(wish, prepared, overhead), labels)


def check_level(prepared: Prepared, wish: Wish, level: LayerPlan) -> int:
    """Refuse a level that a layer cannot have.

    Returns:
        Bytes of the files beside their tensors, if every layer had it.

    Raises:
        UserError: See `check`.
    """
    found = prepared.found
    layers = {name: for_layer(level, layer) for name, layer in found.layers.items()}
    plan = Plan(layers, wish.format, wish.options)
    arrangement = check(prepared, plan)
    return arrangement.size - sum(slot.info.size for slot in arrangement.slots.values())


def _items(wish: Wish, found: Structure, apart: Callable[[Layer], str]) -> list[list[Layer]]:
    """Layers that must get the same level: alike in `apart`, or scaled together by a method."""
    quantized = wish.bits is not None or bool(wish.budget)
    scaled = quantized and catalogue.get(f"quantize/{wish.method}").rows == "input"
    grouped: dict[str, list[Layer]] = {}
    for layer in found.layers.values():
        key = layer.reads if scaled and layer.feeder else apart(layer)
        grouped.setdefault(key, []).append(layer)
    return list(grouped.values())


def _densities(wish: Wish, prepared: Prepared, allocator: catalogue.Method) -> _Market:
    """Densities, in weights that are kept; layers are free of each other, if methods let them."""
    found = prepared.found
    steps = COARSE if {"errors", "scores"}.intersection(allocator.evidence) else FINE
    # The lowest density must leave the smallest layer a weight.
    first = -(-steps // min(layer.count for layer in found.layers.values()))
    densities = [step / steps for step in range(first, steps + 1)]
    levels = [replace(wish.level(wish.bits), density=density) for density in densities]
    check_level(prepared, wish, levels[0])
    items = _items(wish, found, lambda layer: layer.name)
    counts = [sum(layer.count for layer in item) for item in items]
    costs = [(torch.arange(first, steps + 1) * count) // steps for count in counts]
    budget = int(wish.density * sum(counts))
    return _Market(items, levels, costs, budget, [f"density {d:g}" for d in densities])


def _evidence(market: _Market, looked: Survey, source: Source) -> Mapping[str, Callable[[], Any]]:
    """What an allocator may read, each made when it is asked for."""

    def errors(item: Sequence[Layer]) -> torch.Tensor:
        curves = [looked.errors[layer.name] for layer in item]
        return torch.tensor(curves, dtype=torch.float64).sum(0)  # (levels,)

    def score(item: Sequence[Layer]) -> float:
        (scores,) = looked.scores.values()
        # Layers of one item may differ; the most sensitive one speaks for all.
        return max(scores[layer.name] for layer in item)

    def weight(item: Sequence[Layer]) -> torch.Tensor:
        parts = [layer.matrix(source.read(layer.tensor)).flatten() for layer in item]
        return torch.cat(parts).float()  # (entries,)

    return {
        "costs": lambda: market.costs,
        "errors": lambda: [errors(item) for item in market.items],
        "scores": lambda: torch.tensor([score(item) for item in market.items]),
        "weights": lambda: _Lazy([functools.partial(weight, item) for item in market.items]),
    }


class _Lazy(Sequence[torch.Tensor]):
    """Tensors that are read when they are looked at, so that one at a time is in memory."""

    def __init__(self, makers: Sequence[Callable[[], torch.Tensor]]) -> None:
        self._makers = makers

    def __len__(self) -> int:
        return len(self._makers)

    def __getitem__(self, place: Any) -> Any:
        return self._makers[place]()


def budget_amount(budget: str) -> tuple[float, str]:
    """A budget's number and its unit.

    Raises:
        UserError: It is not written as one.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(bits?|%|[KMG]?i?B)\s*", budget)
    unit = match[2] if match else ""
    if not match or (unit not in _UNITS and not unit.startswith(("bit", "%"))):
        raise UserError(
            f"{budget!r} is not a budget.", "Write it as 3.5bits, 40% or 1.2GiB (also MB, GB, MiB)."
        )
    return float(match[1]), unit


def budget_bytes(wish: Wish, prepared: Prepared, overhead: int) -> int:
    """What a budget leaves for the planned layers, in bytes.

    "3.5bits" counts everything stored for the planned layers, scales and zero points included;
    "40%" and "1.2GiB" are of the whole files, of which their headers and what is left alone take
    their part first.

    Raises:
        UserError: The format does not get smaller, or what is left alone takes more.
    """
    budget, source, found = wish.budget, prepared.source, prepared.found
    amount, unit = budget_amount(budget)
    if unit.startswith("bit"):
        return int(amount * sum(layer.count for layer in found.layers.values()) / 8)
    if wish.format == "dense":
        raise UserError(
            f"a budget of {budget} is one of files, and dense files keep their size.",
            "Add --format compressed-tensors or --format layerwise, or give a budget in bits.",
        )
    everything = source.size
    format = export.get(wish.format, source)
    alone = overhead + sum(format.rest_size(source.tensors[name]) for name in found.left)
    wanted = everything * amount / 100 if unit == "%" else amount * _UNITS[unit]
    if wanted < alone:
        raise UserError(
            f"a budget of {budget} is {wanted / 1e6:.2f} MB, but what is left alone (embeddings, "
            f"norms, head) takes {alone / 1e6:.2f} MB.",
            f"Give more than {100 * alone / everything:.0f}%.",
        )
    return int(wanted - alone)


def _explained(
    layer: Layer, market: _Market, level: int, looked: Survey, allocator: catalogue.Method
) -> LayerPlan:
    """A layer's plan with what was known of the layer when the level was chosen."""
    label = market.labels[level]
    score = None
    if looked.scores:
        ((name, scores),) = looked.scores.items()
        score = scores[layer.name]
        why = f"{name} {score:.3g} ranks it for {label}"
    elif looked.errors:
        errors = looked.errors[layer.name]
        score = errors[0]
        beside = [n for n in (level - 1, level + 1) if 0 <= n < len(errors)]
        others = ", ".join(f"{errors[n]:.2%} at {market.labels[n]}" for n in beside)
        why = f"loses {errors[level]:.2%} at {label} ({others})"
    else:
        why = f"{allocator.name} gives it {label}"
    shown = None if score is None else float(f"{score:.4g}")
    return for_layer(replace(market.levels[level], score=shown, why=why), layer)
