"""From a wish (bits, a budget, or a quality) to a plan: who gets how much, and why."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from layerwise.core import catalogue
from layerwise.core.economy import LAVISH, Economy
from layerwise.core.errors import UserError
from layerwise.core.keeping.candidates import Candidates
from layerwise.core.plan import LayerPlan, Plan, check_options
from layerwise.core.progress import Progress
from layerwise.core.reading.checkpoint import Source
from layerwise.core.reading.structure import Layer
from layerwise.core.running.carried import Shelf, shelf
from layerwise.core.telling.forecast import Foresight, Outlook
from layerwise.core.telling.outcome import Candidate
from layerwise.flow import market as markets
from layerwise.flow import sensitivity
from layerwise.flow.foreseeing import Looking
from layerwise.flow.market import Market, label
from layerwise.flow.preparing import Prepared, check
from layerwise.flow.probing import Probe
from layerwise.flow.promising import (
    comparing,
    foresight,
    least,
    promised,
    promised_search,
    search_foresight,
)
from layerwise.flow.survey import (
    Survey,
    everywhere,
    for_layer,
    known_losses,
    missing,
    survey,
)
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
        foreseen: What looking for it was to take; None if nothing was tried.
    """

    plan: Plan
    curves: Mapping[str, Sequence[Candidate]] = field(
        default_factory=dict[str, Sequence[Candidate]]
    )
    sensitivity: str = ""
    notes: Sequence[str] = ()
    foreseen: Outlook | None = None


def make_plan(
    prepared: Prepared,
    wish: Wish,
    candidates: Candidates,
    progress: Progress,
    max_memory: str = "",
    economy: Economy | None = None,
) -> Planned:
    """Turn a wish into a plan.

    Args:
        prepared: The model.
        wish: What is asked for.
        candidates: Where what levels make of layers is kept.
        progress: Is told of the stages.
        max_memory: The most memory that looking for the plan, or carrying it out, may hold.
        economy: How to look for it, where that is settled; nothing is foreseen then.

    Raises:
        UserError: The wish asks for nothing, for less than the lowest levels take, or for a level
            that `check` would refuse, or more memory than is allowed: all of it before any layer
            is looked at.
    """
    found = prepared.found
    wish = wish.fitted(found)
    allocator = wish.allocator()
    if allocator is None:
        even = replace(wish.level(wish.bits), why="the same for every layer")
        layers = everywhere(even, found, prepared.source, wish.options)
        inputs = wish.inputs or "transformed"
        plan = Plan(layers, wish.format, wish.options, inputs=inputs, server=wish.server)
        return Planned(_beside(plan, wish))
    if wish.shares_bytes:
        market = markets.of_bytes(wish, prepared)
    else:
        market = markets.of_densities(wish, prepared, allocator)
    if wish.max_kl is None:
        markets.check_affordable(wish, prepared, market)
    measures = [catalogue.get(f"measure/{wish.measure}")] if "scores" in allocator.evidence else []
    for method in (allocator, *measures):
        check_options(method.id, wish.options.get(method.id, {}))
    levels = _levels(market, allocator, measures)
    weights = sensitivity.chosen(wish, prepared) if "errors" in allocator.evidence else ""
    foreseen = None
    if economy is None:
        # Both are refused before any work is lost: looking for the plan, and carrying it out.
        afterwards = _largest(prepared, wish, market) if max_memory else None
        looking = looking_for(prepared, wish, levels, measures, weights, candidates)
        economy, foreseen = _promised(prepared, looking, progress, max_memory, afterwards)
    if prepared.runner is not None:
        prepared = replace(prepared, runner=prepared.runner.running(economy.tokens))
    looked = Survey({}, {}, {})
    if levels:
        looked = survey(
            prepared,
            levels,
            options=wish.options,
            measures=measures,
            candidates=candidates,
            economy=economy,
            progress=progress,
        )
    with shelf(economy.on_disk, candidates.cache.folder) as kept:
        costs: Mapping[str, Tensor] = {}
        if weights:
            costs = sensitivity.weighed(weights, prepared, wish, looked, candidates, progress, kept)
        sale = _Sale(prepared, wish, market, allocator, looked, costs, weights)
        if wish.max_kl is None:
            bought = sale.within_files(market.budget)
        else:
            bought = _search(sale, wish.max_kl, candidates, progress, kept)
    noted = (f"while the plan was looked for, {note}" for note in economy.notes())
    planned = sale.planned(bought)
    return replace(planned, notes=[*planned.notes, *noted], foreseen=foreseen)


def _beside(plan: Plan, wish: Wish) -> Plan:
    """A plan with what is asked for beside its layers."""
    return replace(plan, rewriting=wish.rewriting, tune=wish.tune, recover=wish.recover)


def _levels(
    market: Market, allocator: catalogue.Method, measures: Sequence[catalogue.Method]
) -> Mapping[str, Sequence[LayerPlan]]:
    """The levels that an allocator must know the errors of, or that a measure compares."""
    levels = market.by_layer()
    if "errors" in allocator.evidence:
        return levels
    if not measures:
        return {}
    comparing = any("approximation" in measure.evidence for measure in measures)
    return {name: plans[: int(comparing)] for name, plans in levels.items()}


def _promised(
    prepared: Prepared,
    looking: Looking,
    progress: Progress,
    limit: str,
    afterwards: Foresight | None,
) -> tuple[Economy, Outlook | None]:
    """How a plan is looked for, and what that takes; None if there is nothing to look at."""
    economy, foreseen = LAVISH, None
    if not looking.nothing:
        rest = 0 if afterwards is None else least(afterwards)
        economy, foreseen = promised_search(search_foresight(prepared, looking), limit, rest)
    if afterwards is not None:
        promised(afterwards, limit, later=True)
    if foreseen is None:
        return economy, None
    progress.tell(
        f"forecast of looking for a plan: about {foreseen.seconds:.0f} s, "
        f"{foreseen.peak_bytes / 1e6:.2f} MB of memory at most ({foreseen.fullest})"
    )
    return economy, foreseen


def looking_for(
    prepared: Prepared,
    wish: Wish,
    levels: Mapping[str, Sequence[LayerPlan]],
    measures: Sequence[catalogue.Method],
    weights: str,
    candidates: Candidates,
) -> Looking:
    """What there is to look at: what is known by now is not."""
    known = known_losses(prepared.found, levels, wish.options, candidates)
    calibration = 0 if prepared.calibration is None else len(prepared.calibration.ids)
    gradients = apart = layers = together = graphs = 0
    if weights == "fisher" and not candidates.cache.has(sensitivity.fisher_key(candidates)):
        gradients = min(sensitivity.FISHER_WINDOWS, calibration)
    middle = sensitivity.middle_of(levels) if weights == "kl" else {}
    shared = sensitivity.hessian_key(candidates, levels, wish.options)
    if weights == "hessian" and not candidates.cache.has(shared):
        places = max(map(len, levels.values()), default=0)
        graphs = places * min(sensitivity.HESSIAN_WINDOWS, calibration)
    if weights == "kl" and not candidates.cache.has(
        sensitivity.kl_key(candidates, middle, wish.options)
    ):
        apart = min(sensitivity.PROBE_WINDOWS, calibration)
        layers = len(middle)
    if wish.max_kl is not None and prepared.heldout is not None:
        together = len(prepared.heldout.ids)
    return Looking(
        levels=levels if measures else missing(known, levels),
        options=wish.options,
        measures=measures,
        gradients=gradients,
        apart=apart,
        layers=layers,
        graphs=graphs,
        together=together,
        comparing=comparing(False) if apart or together else 0.0,
    )


def _largest(prepared: Prepared, wish: Wish, market: Market) -> Foresight:
    """What carrying out the largest plan takes."""
    largest = {
        name: next((plan for plan in reversed(plans) if plan.steps), plans[-1])
        for name, plans in market.by_layer().items()
    }
    ordered = {name: largest[name] for name in prepared.found.layers}
    inputs = wish.inputs or "original"
    plan = Plan(ordered, wish.format, wish.options, inputs=inputs, server=wish.server)
    return foresight(prepared, plan, check(prepared, plan).size)


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

    def budgets(self) -> Sequence[int]:
        """Ascending, those that can differ in what they buy."""
        least, most = self.market.least, self.market.most
        if not self.allocator.nested:
            return range(least, most + 1)
        found = [most]
        while found[-1] > least:
            found.append(_spent(self.market, self.at(found[-1] - 1)))
        return found[::-1]

    def at(self, budget: int) -> list[int]:
        """The level of each item that the allocator buys."""
        given = {word: self._evidence()[word]() for word in self.allocator.evidence}
        own = self.wish.options.get(self.allocator.id, {})
        return [int(level) for level in self.allocator.run(**given, budget=budget, **own)]

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
        return _beside(plan, wish)

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
            "shapes": lambda: [_shape(source, item) for item in items],
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
        why = "; ".join(filter(None, (why, levels[level].why)))
        shown = None if score is None else float(f"{score:.4g}")
        return for_layer(replace(levels[level], score=shown, why=why), layer)

    def _told(self, cost: float) -> str:
        if self.weights == "error":
            return f"{cost:.2%}"
        return f"{cost:.3g} nats" if self.weights in sensitivity.IN_NATS else f"{cost:.3g}"


def _weights(source: Source, item: Sequence[Layer]) -> Tensor:
    parts = [layer.matrix(source.read(layer.tensor)).flatten() for layer in item]
    return torch.cat(parts).float()  # (entries,)


def _shape(source: Source, item: Sequence[Layer]) -> tuple[int, ...]:
    """Layers of one item read one input: their rows are those of one weight."""
    first = item[0]
    kernel = source.tensors[first.tensor].shape[1:]
    inner = kernel if first.layout == "convolution" else (first.width,)
    return (sum(layer.rows for layer in item), *inner)


class _Lazy(Sequence[Tensor]):
    """Tensors that are read when they are looked at, so that one at a time is in memory."""

    def __init__(self, makers: Sequence[Callable[[], Tensor]]) -> None:
        self._makers = makers

    def __len__(self) -> int:
        return len(self._makers)

    def __getitem__(self, place: Any) -> Any:
        return self._makers[place]()


def _search(
    sale: _Sale, max_kl: float, candidates: Candidates, progress: Progress, shelf: Shelf
) -> list[int]:
    """The smallest plan whose KL on the text of the proof is not above a limit, by halving.

    Of an allocator whose plans are nested every plan is in reach, in log2(plans + 1) + 1 trials;
    of another, to half a per cent of the size.  Should the KL not rise as the size falls, a smaller
    plan may be missed; what is returned was measured.

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
    probe = Probe(prepared, wish.format, wish.options, candidates, prepared.heldout.ids, shelf)
    budgets = sale.budgets()
    near = 0 if sale.allocator.nested else int(_SEARCHED * budgets[-1])
    progress.stage("search", 1 + (len(budgets) // (near + 1)).bit_length())
    best, reached = _tried(sale, probe, budgets[-1], progress)
    if reached > max_kl:
        raise UserError(
            f"a KL of at most {max_kl:g} is out of reach: the dearest levels reach {reached:.4g}.",
            f"Give --max-kl {reached * 1.01:.3g} or more, or allow higher levels "
            "(--allow bits=4,8,16).",
        )
    # What is bought with one is enough, with the other it is not: with nothing, at first.
    low, high = -1, len(budgets) - 1
    while high - low > 1 + near:
        middle = (low + high) // 2
        bought, reached = _tried(sale, probe, budgets[middle], progress)
        if reached <= max_kl:
            best, high = bought, budgets.index(_spent(sale.market, bought))
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
