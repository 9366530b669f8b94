"""From a wish (bits, a budget, or a quality) to a plan: who gets how much, and why."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from layerwise.core import catalogue
from layerwise.core.candidates import Candidates
from layerwise.core.checkpoint import Source
from layerwise.core.errors import UserError
from layerwise.core.outcome import Candidate
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.progress import Progress
from layerwise.core.structure import Layer
from layerwise.flow import market as markets
from layerwise.flow import sensitivity
from layerwise.flow.market import Market, label
from layerwise.flow.preparing import Prepared, check
from layerwise.flow.probing import Probe
from layerwise.flow.survey import Survey, for_layer, survey
from layerwise.flow.wish import Wish

# A search for the smallest model of a quality ends when this share of its size is left to search.
_SEARCHED = 0.005


@dataclass(frozen=True)
class Planned:
    """A plan, and what it was chosen from.

    Attributes:
        plan: The plan.
        curves: What each layer could have got, with its bytes and its cost; empty if nothing was
            tried.
        sensitivity: What the costs of `curves` are; "" if nothing was tried.
        notes: What the reader of a report should know.
    """

    plan: Plan
    curves: Mapping[str, Sequence[Candidate]] = field(
        default_factory=dict[str, Sequence[Candidate]]
    )
    sensitivity: str = ""
    notes: Sequence[str] = ()


def make_plan(
    prepared: Prepared, wish: Wish, candidates: Candidates, progress: Progress
) -> Planned:
    """Turn a wish into a plan.

    Raises:
        UserError: The wish asks for nothing, for less than the lowest levels take, or for a level
            that `check` would refuse: all of it before any layer is looked at.
    """
    found = prepared.found
    wish = wish.fitted(found)
    allocator = wish.allocator()
    if allocator is None:
        even = replace(wish.level(wish.bits), why="the same for every layer")
        layers = {name: for_layer(even, layer) for name, layer in found.layers.items()}
        inputs = wish.inputs or "transformed"
        plan = Plan(layers, wish.format, wish.options, inputs=inputs, server=wish.server)
        return Planned(replace(plan, rewriting=wish.rewriting))
    if wish.shares_bytes:
        market = markets.of_bytes(wish, prepared)
    else:
        market = markets.of_densities(wish, prepared, allocator)
    if wish.max_kl is None:
        markets.check_affordable(wish, prepared, market)
    measures = [catalogue.get(f"measure/{wish.measure}")] if "scores" in allocator.evidence else []
    looked = _look(prepared, wish, market, allocator, measures, candidates, progress)
    weights = ""
    costs: Mapping[str, Tensor] = {}
    if "errors" in allocator.evidence:
        weights = sensitivity.chosen(wish, prepared)
        costs = sensitivity.weighed(weights, prepared, wish, looked, candidates, progress)
    sale = _Sale(prepared, wish, market, allocator, looked, costs, weights)
    if wish.max_kl is None:
        bought = sale.within_files(market.budget)
    else:
        bought = _search(sale, wish.max_kl, candidates, progress)
    return sale.planned(bought)


def _look(
    prepared: Prepared,
    wish: Wish,
    market: Market,
    allocator: catalogue.Method,
    measures: Sequence[catalogue.Method],
    candidates: Candidates,
    progress: Progress,
) -> Survey:
    """Try the levels that an allocator must know the errors of, or that a measure compares."""
    levels = market.by_layer()
    if "errors" not in allocator.evidence:
        comparing = any("approximation" in measure.evidence for measure in measures)
        levels = {name: plans[: int(comparing)] for name, plans in levels.items()}
        if not measures:
            return Survey({}, {}, {})
    return survey(
        prepared,
        levels,
        options=wish.options,
        measures=measures,
        candidates=candidates,
        progress=progress,
    )


@dataclass(frozen=True)
class _Sale:
    """A market, what is known of its levels, and the allocator that buys there.

    `costs` has what each level of each layer costs the model, in the unit of `weights`.
    """

    prepared: Prepared
    wish: Wish
    market: Market
    allocator: catalogue.Method
    looked: Survey
    costs: Mapping[str, Tensor]
    weights: str

    def within_files(self, budget: int) -> list[int]:
        """The levels for a budget; headers can take a little more of it than was foreseen."""
        wanted = markets.file_budget(self.wish, self.prepared)
        while True:
            bought = self.at(budget)
            over = 0 if wanted is None else check(self.prepared, self.plan(bought)).size - wanted
            if over <= 0:
                return bought
            # The cheapest plan is known to fit.
            budget = max(budget - over, self.market.least)

    def at(self, budget: int) -> list[int]:
        """The level of each item that the allocator buys."""
        given = {word: self._evidence()[word]() for word in self.allocator.evidence}
        return [int(level) for level in self.allocator.run(**given, budget=budget)]

    def plan(self, bought: Sequence[int]) -> Plan:
        """The plan of some levels, one for each item."""
        wish = self.wish
        layers = {
            layer.name: self._explained(layer, levels, level)
            for item, levels, level in zip(
                self.market.items, self.market.levels, bought, strict=True
            )
            for layer in item
        }
        ordered = {name: layers[name] for name in self.prepared.found.layers}
        budget = wish.budget or (f"KL at most {wish.max_kl:g}" if wish.max_kl else "")
        inputs = wish.inputs or "original"
        plan = Plan(ordered, wish.format, wish.options, budget, inputs, wish.server)
        return replace(plan, rewriting=wish.rewriting)

    def planned(self, bought: Sequence[int]) -> Planned:
        """The plan, with what it was chosen from."""
        curves: dict[str, list[Candidate]] = {}
        for item, levels, level, sizes in zip(
            self.market.items, self.market.levels, bought, self.market.costs, strict=True
        ):
            total = sum(layer.count for layer in item)
            for layer in item if self.costs else ():
                costs = self.costs[layer.name].tolist()
                curves[layer.name] = [
                    Candidate(
                        label(one),
                        one.bits,
                        one.density,
                        one.rank,
                        int(sizes[number]) * layer.count // total,
                        costs[number],
                        number == level,
                    )
                    for number, one in enumerate(levels)
                ]
        return Planned(self.plan(bought), curves, self.weights, self.market.notes)

    def _evidence(self) -> Mapping[str, Callable[[], Any]]:
        """What an allocator may read, each made when it is asked for."""
        items, source = self.market.items, self.prepared.source

        def score(item: Sequence[Layer]) -> float:
            (scores,) = self.looked.scores.values()
            # Layers of one item may differ; the most sensitive one speaks for all.
            return max(scores[layer.name] for layer in item)

        return {
            "costs": lambda: self.market.costs,
            "errors": lambda: [
                torch.stack([self.costs[layer.name] for layer in item]).sum(0) for item in items
            ],
            "scores": lambda: torch.tensor([score(item) for item in items]),
            "weights": lambda: _Lazy([functools.partial(_weights, source, item) for item in items]),
        }

    def _explained(self, layer: Layer, levels: Sequence[LayerPlan], level: int) -> LayerPlan:
        """A layer's plan with what was known of the layer when the level was chosen."""
        chosen = label(levels[level])
        score = None
        if self.looked.scores:
            ((name, scores),) = self.looked.scores.items()
            score = scores[layer.name]
            why = f"{name} {score:.3g} ranks it for {chosen}"
        elif self.costs:
            costs = self.costs[layer.name].tolist()
            score = costs[0]
            beside = [n for n in (level - 1, level + 1) if 0 <= n < len(costs)]
            others = ", ".join(f"{self._told(costs[n])} at {label(levels[n])}" for n in beside)
            why = f"loses {self._told(costs[level])} at {chosen}" + f" ({others})" * bool(others)
        else:
            why = f"{self.allocator.name} gives it {chosen}"
        shown = None if score is None else float(f"{score:.4g}")
        return for_layer(replace(levels[level], score=shown, why=why), layer)

    def _told(self, cost: float) -> str:
        if self.weights == "error":
            return f"{cost:.2%}"
        return f"{cost:.3g} nats" if self.weights in sensitivity.IN_NATS else f"{cost:.3g}"


def _weights(source: Source, item: Sequence[Layer]) -> Tensor:
    parts = [layer.matrix(source.read(layer.tensor)).flatten() for layer in item]
    return torch.cat(parts).float()  # (entries,)


class _Lazy(Sequence[Tensor]):
    """Tensors that are read when they are looked at, so that one at a time is in memory."""

    def __init__(self, makers: Sequence[Callable[[], Tensor]]) -> None:
        self._makers = makers

    def __len__(self) -> int:
        return len(self._makers)

    def __getitem__(self, place: Any) -> Any:
        return self._makers[place]()


def _search(sale: _Sale, max_kl: float, candidates: Candidates, progress: Progress) -> list[int]:
    """The smallest plan whose KL on the text of the proof is not above a limit, by halving.

    Raises:
        UserError: There is no text to find the KL on, or not even the dearest levels reach it.
    """
    prepared, wish = sale.prepared, sale.wish
    if prepared.runner is None or prepared.heldout is None:
        raise UserError(
            f"a KL of at most {max_kl:g} is found by running {prepared.source.label}, "
            "which is not run here.",
            "Give a language model and leave --proof none out, or give a --budget.",
        )
    probe = Probe(prepared, wish.format, wish.options, candidates, prepared.heldout.ids)
    low, high = sale.market.least, sale.market.most
    progress.stage("search", 2 + (int((high - low) / (_SEARCHED * high))).bit_length())
    best, reached = _tried(sale, probe, high, progress)
    if reached > max_kl:
        raise UserError(
            f"a KL of at most {max_kl:g} is out of reach: the dearest levels reach {reached:.4g}.",
            f"Give --max-kl {reached * 1.01:.3g} or more, or allow higher levels "
            "(--allow bits=4,8,16).",
        )
    while high - low > _SEARCHED * high:
        middle = (low + high) // 2
        bought, reached = _tried(sale, probe, middle, progress)
        if reached <= max_kl:
            best, high = bought, _spent(sale.market, bought)
        else:
            low = middle
    return best


def _tried(sale: _Sale, probe: Probe, budget: int, progress: Progress) -> tuple[list[int], float]:
    bought = sale.at(budget)
    reached = probe.together(sale.plan(bought).layers)
    progress.step(f"KL {reached:.4g} at {budget / 1e6:.2f} MB")
    return bought, reached


def _spent(market: Market, bought: Sequence[int]) -> int:
    return sum(int(cost[level]) for cost, level in zip(market.costs, bought, strict=True))
