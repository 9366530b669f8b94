"""What a budget can buy: the levels of each item, what they cost, and what there is to spend."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from layerwise import export
from layerwise.core import catalogue
from layerwise.core.errors import UserError
from layerwise.core.format import Format
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.reading.structure import Layer, Structure
from layerwise.core.written import UNITS
from layerwise.export import servers
from layerwise.flow.preparing import Prepared, check
from layerwise.flow.survey import for_layer, settled
from layerwise.flow.wish import Wish, budget_amount

# Densities between 0 and 1 that are shared out by themselves: few for an allocator that goes by
# what each does to a layer, since every one of them is tried; many for the others.
COARSE, FINE = 10, 1000


@dataclass(frozen=True, slots=True)
class Market:
    """What an allocator chooses among.

    Attributes:
        items: Layers that must get the same level.
        levels: Plans that an item's layers may get, cheapest first, one list per item.
        costs: What each level costs, one tensor per item: bytes, or weights kept.
        budget: What all items may cost together.
        notes: What the plan's reader should know.
    """

    items: Sequence[Sequence[Layer]]
    levels: Sequence[Sequence[LayerPlan]]
    costs: Sequence[Int[Tensor, " _"]]
    budget: int
    notes: Sequence[str] = ()

    @property
    def least(self) -> int:
        """What the first levels of all items cost together."""
        return sum(int(cost[0]) for cost in self.costs)

    @property
    def most(self) -> int:
        """What the last levels of all items cost together."""
        return sum(int(cost[-1]) for cost in self.costs)

    def by_layer(self) -> dict[str, list[LayerPlan]]:
        """The levels of each layer, in the order of its item's."""
        return {
            layer.name: [for_layer(level, layer) for level in levels]
            for item, levels in zip(self.items, self.levels, strict=True)
            for layer in item
        }


def label(level: LayerPlan) -> str:
    """A level in words."""
    parts = ["own dtype" if level.bits is None else f"{level.bits} bits"]
    parts += [f"density {level.density:g}"] if level.density < 1 else []
    parts += [f"rank {level.rank}"] if level.rank else []
    return ", ".join(parts[1:] if level.bits is None and parts[1:] else parts)


def of_bytes(wish: Wish, prepared: Prepared) -> Market:
    """Combinations of width, density and rank, in stored bytes; fused layers are one item.

    Raises:
        UserError: A level cannot be had, or the budget is below the cheapest plan.
    """
    found, format = prepared.found, export.get(wish.format, prepared.source, wish.options)
    combinations = wish.combinations()
    for level in combinations:
        check_level(prepared, wish, level)
    rules = servers.allowed(wish.server, wish.format)
    items = _items(wish, found, rules.together)
    offered = [settled(combinations, item, prepared.source, wish.options) for item in items]
    sold = [_sold(item, levels, format, found) for item, levels in zip(items, offered, strict=True)]
    market = Market(
        items,
        [[level for _, level in one] for one in sold],
        [torch.tensor([cost for cost, _ in one]) for one in sold],
        0,
        _useless(wish, sold),
    )
    if wish.budget:
        return replace(market, budget=_budget_bytes(wish, prepared, market))
    return market


def _sold(
    item: Sequence[Layer], combinations: Sequence[LayerPlan], format: Format, found: Structure
) -> list[tuple[int, LayerPlan]]:
    """The levels an item can have with their costs, cheapest first.

    A level is left out when one that gives no less of anything costs no more.

    Raises:
        UserError: It can have none of them.
    """
    sold = [
        (_size(item, level, format), level)
        for level in combinations
        if _held(item, level, format, found)
    ]
    if not sold:
        raise UserError(
            f"{item[0].name} can have none of the levels that are allowed.",
            "Allow one that it can have: --allow bits=4,8 (none leaves it as it is).",
        )

    def beaten(cost: int, level: LayerPlan) -> bool:
        return any(
            other != level and price <= cost and _gives_as_much(other, level)
            for price, other in sold
        )

    kept = [one for one in sold if not beaten(*one)]
    return sorted(kept, key=lambda one: (one[0], -one[1].density, -(one[1].bits or 0)))


def _size(item: Sequence[Layer], level: LayerPlan, format: Format) -> int:
    tensors = format.source.tensors
    return sum(format.size(one, for_layer(level, one), tensors[one.tensor]) for one in item)


def _gives_as_much(one: LayerPlan, other: LayerPlan) -> bool:
    widest = float("inf")
    bits = [widest if plan.bits is None else plan.bits for plan in (one, other)]
    return bits[0] >= bits[1] and one.density >= other.density and one.rank >= other.rank


def _useless(wish: Wish, sold: Sequence[Sequence[tuple[int, LayerPlan]]]) -> list[str]:
    """Says which allowed densities and ranks no layer can use."""
    kept = [level for one in sold for _, level in one]
    notes: list[str] = []
    for name in ("density", "rank"):
        left = {getattr(level, name) for level in kept}
        if gone := [value for value in wish.allow.get(name, ()) if value not in left]:
            values = ", ".join(f"{value:g}" for value in gone if value is not None)
            why = "stores zeros in full" if name == "density" else "has no layer that it suits"
            notes.append(
                f"{name} {values} makes no layer smaller in {wish.format}, which {why}: left out"
                if name == "density"
                else f"rank {values} suits no layer: left out"
            )
    return notes


def check_level(prepared: Prepared, wish: Wish, level: LayerPlan) -> None:
    """Refuse a level that no layer can have; some may be too narrow for it, or of another shape.

    Raises:
        UserError: See `check`; of what the format cannot hold it names the formats that can.
    """
    if not level.steps:
        return
    found, format = prepared.found, export.get(wish.format, prepared.source, wish.options)
    suited = {
        layer.name: for_layer(level, layer) if _held(item, level, format, found) else LayerPlan()
        for item in found.items()
        for layer in item
    }
    if not any(layer.steps for layer in suited.values()):
        suited = {name: for_layer(level, layer) for name, layer in found.layers.items()}
    try:
        check(prepared, Plan(suited, wish.format, wish.options, server=wish.server))
    except UserError as error:
        if able := _able(prepared, suited, wish):
            remedy = f"{error.remedy} Formats that can hold {label(level)}: {', '.join(able)}."
            raise UserError(error.problem, remedy) from error
        raise


def _held(item: Sequence[Layer], level: LayerPlan, format: Format, found: Structure) -> bool:
    """Whether all layers of an item can have a level, and a format has a place for it."""
    if any(level.rank > min(layer.rows, layer.width) for layer in item):
        return False
    if any(round(level.density * layer.count) == 0 for layer in item):
        return False
    try:
        format.check(Plan({layer.name: for_layer(level, layer) for layer in item}), found)
    except UserError:
        return False
    return True


def _able(prepared: Prepared, layers: Mapping[str, LayerPlan], wish: Wish) -> list[str]:
    """Formats that hold some layers, where the one wished for is what stands in the way."""
    able: list[str] = []
    for name in export.FORMATS:
        try:
            check(prepared, Plan(layers, name, wish.options, server=wish.server))
        except UserError:
            continue
        able.append(name)
    return able


def _items(wish: Wish, found: Structure, apart: Callable[[Layer], str]) -> list[list[Layer]]:
    """Layers that must get the same level: alike in `apart`, or scaled together by a method."""
    quantized = wish.bits is not None or wish.shares_bytes
    scaled = quantized and catalogue.get(f"quantize/{wish.method}").rows == "input"
    grouped: dict[str, list[Layer]] = {}
    for layer in found.layers.values():
        key = layer.reads if scaled and layer.feeder else apart(layer)
        grouped.setdefault(key, []).append(layer)
    return list(grouped.values())


def of_densities(wish: Wish, prepared: Prepared, allocator: catalogue.Method) -> Market:
    """Densities, in weights that are kept; layers are free of each other, if methods let them."""
    found = prepared.found
    coarse = {"errors", "scores"}.intersection(allocator.evidence) and not allocator.fine
    steps = COARSE if coarse else FINE
    # The lowest density must leave the smallest layer a weight.
    first = -(-steps // min(layer.count for layer in found.layers.values()))
    densities = [step / steps for step in range(first, steps + 1)]
    levels = [replace(wish.level(wish.bits), density=density) for density in densities]
    check_level(prepared, wish, levels[0])
    items = _items(wish, found, lambda layer: layer.name)
    counts = [sum(layer.count for layer in item) for item in items]
    costs = [(torch.arange(first, steps + 1) * count) // steps for count in counts]
    offered = [settled(levels, item, prepared.source, wish.options) for item in items]
    return Market(items, offered, costs, int(wish.density * sum(counts)))


def check_affordable(wish: Wish, prepared: Prepared, market: Market) -> None:
    """Refuse a budget that no plan can keep.

    Raises:
        UserError: It names the smallest that can.
    """
    if market.budget >= market.least:
        return
    if not wish.shares_bytes:
        raise UserError(
            f"the budget leaves {market.budget} weights for the layers, and the lowest levels take "
            f"{market.least}.",
            f"Give a density of {market.least / market.most:.4f} or more.",
        )
    share = 8 / sum(layer.count for layer in prepared.found.layers.values())
    amount, unit = budget_amount(wish.budget)
    short = market.least - market.budget
    if unit.startswith("bit"):
        smallest = f"{_up(market.least * share, 4)}bits"
    elif unit == "%":
        smallest = f"{_up(amount + 100 * short / prepared.source.size, 2)}%"
    else:
        smallest = f"{_up(amount + short / UNITS[unit], 4)}{unit}"
    raise UserError(
        f"the budget leaves {market.budget * share:.3f} bits per weight for the layers, and the "
        f"lowest levels take {market.least * share:.3f}.",
        f"Give --budget {smallest} or more, or allow lower levels (--allow bits=2).",
    )


def _up(value: float, digits: int) -> str:
    """Rounded up to so many decimal digits."""
    return f"{-(-value * 10**digits // 1) / 10**digits:g}"


def file_budget(wish: Wish, prepared: Prepared) -> int | None:
    """The size that a budget sets for all weight files together; None if it sets another thing."""
    if not wish.budget:
        return None
    amount, unit = budget_amount(wish.budget)
    if unit.startswith("bit"):
        return None
    return int(prepared.source.size * amount / 100 if unit == "%" else amount * UNITS[unit])


def _budget_bytes(wish: Wish, prepared: Prepared, market: Market) -> int:
    """What a budget leaves for the planned layers, in bytes.

    "3.5bits" counts everything stored for the planned layers, scales and zero points included;
    "40%" and "1.2GiB" are of the whole files, of which their headers and what is left alone take
    their part first.

    Raises:
        UserError: The format does not get smaller, or what is left alone takes more.
    """
    wanted = file_budget(wish, prepared)
    if wanted is None:
        amount, _ = budget_amount(wish.budget)
        return int(amount * sum(layer.count for layer in prepared.found.layers.values()) / 8)
    if wish.format == "dense":
        raise UserError(
            f"a budget of {wish.budget} is one of files, and dense files keep their size.",
            "Add --format compressed-tensors or --format layerwise, or give a budget in bits.",
        )
    levels = {name: plans[0] for name, plans in market.by_layer().items()}
    ordered = {name: levels[name] for name in prepared.found.layers}
    cheapest = check(prepared, Plan(ordered, wish.format, wish.options, server=wish.server)).size
    beside = cheapest - market.least
    if wanted < beside:
        raise UserError(
            f"a budget of {wish.budget} is {wanted / 1e6:.2f} MB, but what is left alone "
            f"(embeddings, norms, head) takes {beside / 1e6:.2f} MB.",
            f"Give --budget {_up(100 * cheapest / prepared.source.size, 2)}% or more.",
        )
    return wanted - beside
