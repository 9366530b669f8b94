"""Layers weighed by what all bring together, and lowered by halving their order."""

import functools
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import layerwise as lw
from layerwise.core.economy import Economy
from layerwise.core.errors import UserError
from layerwise.core.keeping.cache import Cache
from layerwise.core.keeping.candidates import Candidates
from layerwise.core.plan import LayerPlan
from layerwise.core.progress import Silent
from layerwise.core.running.hessian import divergence_shares
from layerwise.core.telling.sample import sampled
from layerwise.flow import planning
from layerwise.flow.foreseeing import _Running
from layerwise.flow.planning import make_plan
from layerwise.flow.preparing import Texts, prepare
from layerwise.flow.probing import Probe
from layerwise.flow.promising import search_foresight
from layerwise.flow.sensitivity import _change
from layerwise.flow.wish import Wish

TEXT = torch.arange(12 * 32).remainder(251).reshape(12, 32)
TEXTS = {"calibration": TEXT[:8], "samples": 8, "length": 32, "text": TEXT[8:], "text_samples": 4}
LOWERED = {"allow": {"bits": [2, None]}, "group": 16, "format": "layerwise"}
HALVED = {**LOWERED, "sensitivity": "hessian", "allocate": "bisection"}


class Trials:
    """Remembers how often the KL of a plan was measured."""

    def __init__(self):
        self.count = 0
        self.promised = 0

    def stage(self, name, steps):
        if name == "search":
            self.promised = steps

    def step(self, what):
        self.count += what.startswith("KL ")

    def tell(self, line):
        pass


def widths(plan):
    return [layer.bits for layer in plan.layers.values()]


def test_the_largest_part_that_keeps_a_kl_is_found_in_few_trials(llama):
    items = len(lw.open(llama).structure.layers)
    sizes = []
    for max_kl in (0.1, 0.5, 2.0, math.inf):
        trials = Trials()
        plan = lw.plan(llama, max_kl=max_kl, **HALVED, **TEXTS, cache=False, progress=trials)
        assert trials.count <= math.ceil(math.log2(items + 1)) + 1
        assert trials.count <= trials.promised
        sizes.append(widths(plan).count(2))
    assert sizes[-1] == items
    assert sizes == sorted(sizes)
    assert 0 < sizes[0] < items


def test_where_no_layer_may_be_lowered_nothing_is_left_to_do(llama):
    with pytest.raises(UserError, match="changes no layer"):
        lw.plan(llama, max_kl=1e-9, **HALVED, **TEXTS, cache=False)


def test_one_layer_more_does_not_keep_it(llama, monkeypatch):
    tried = {}

    def together(self, plans):
        found = measured(self, plans)
        tried[sum(plan.bits == 2 for plan in plans.values())] = found
        return found

    measured = Probe.together
    monkeypatch.setattr(Probe, "together", together)
    plan = lw.plan(llama, max_kl=0.05, **HALVED, **TEXTS, cache=False)
    lowered = widths(plan).count(2)
    assert tried[lowered] <= 0.05 < tried[lowered + 1]


@pytest.mark.parametrize("allocate", ["uniform", "threshold", "bisection", "knapsack"])
def test_what_is_found_was_measured_and_keeps_the_kl(llama, tmp_path, allocate):
    wish = {"allow": {"bits": [2, 3, 4, 8]}, "group": 16, "format": "layerwise"}
    report = lw.compress(
        llama, tmp_path / "out", max_kl=0.03, allocate=allocate, **wish, **TEXTS, cache=False
    )
    assert report.comparison.kl <= 0.03


def test_a_kl_that_does_not_rise_as_layers_are_lowered_is_still_kept(llama, monkeypatch):
    def odd(_, plans):
        lowered = sum(plan.bits == 2 for plan in plans.values())
        return 0.0 if lowered in (0, 7) else 1.0

    monkeypatch.setattr(Probe, "together", odd)
    plan = lw.plan(llama, max_kl=0.5, **HALVED, **TEXTS, cache=False)
    assert widths(plan).count(2) in (0, 7)


def costs(llama, **wish):
    opened, wanted = lw.open(llama), Wish(**wish)
    texts = Texts(TEXT[:8], 8, 32, TEXT[8:], 4)
    prepared = prepare(
        opened.source, opened.structure, wanted.methods(), texts, learning=wanted.learning
    )
    made = make_plan(prepared, wanted, Candidates(Cache(None), ""), Silent())
    return prepared, made


def test_costs_add_up_to_the_kl_of_all_layers_at_one_level(llama):
    allow = {"bits": [6, 8]}
    prepared, made = costs(
        llama, budget="8.9bits", allow=allow, group=16, format="layerwise", sensitivity="hessian"
    )
    assert made.sensitivity == "hessian"
    assert prepared.calibration is not None
    probe = Probe(prepared, "layerwise", {}, Candidates(Cache(None), ""), prepared.calibration.ids)
    for place, bits in enumerate(allow["bits"]):
        plans = {name: replace(plan, bits=bits) for name, plan in made.plan.layers.items()}
        foreseen = sum(curve[place].error for curve in made.curves.values())
        assert foreseen == pytest.approx(probe.together(plans), rel=0.15)


def test_a_layer_as_it_is_costs_nothing(llama):
    _, made = costs(llama, budget="9bits", **HALVED)
    assert all(curve[-1].error == 0 for curve in made.curves.values())
    assert any(curve[0].error > 0 for curve in made.curves.values())


def test_it_is_measured_once_for_all_budgets(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path / "kept"))
    lw.plan(llama, budget="5bits", **HALVED, **TEXTS)

    def never(*_, **__):
        raise AssertionError("it was measured again")

    monkeypatch.setattr("layerwise.flow.sensitivity.divergence_shares", never)
    lw.plan(llama, budget="9bits", **HALVED, **TEXTS)


def test_it_needs_a_calibration_text(llama):
    with pytest.raises(UserError, match="hessian is measured on a calibration text"):
        lw.plan(llama, budget="5bits", **HALVED)


def test_a_model_that_memory_does_not_hold_is_refused_before_work(llama, monkeypatch):
    trials = Trials()
    monkeypatch.setattr("layerwise.flow.foreseeing._Running._graph", lambda _: 1 << 40)
    with pytest.raises(UserError, match="deriving the whole model twice") as refused:
        lw.plan(
            llama,
            budget="5bits",
            **HALVED,
            **TEXTS,
            cache=False,
            max_memory="4GiB",
            progress=trials,
        )
    assert "looking for a plan needs at least" in refused.value.problem


def test_the_graph_is_foreseen(llama):
    """Against what the profiler counts, less what was there before."""
    prepared, made = costs(llama, budget="5bits", **HALVED)
    assert prepared.runner is not None
    assert prepared.calibration is not None
    plans = {name: replace(plan, bits=2) for name, plan in made.plan.layers.items()}
    probe = Probe(prepared, "layerwise", {}, Candidates(Cache(None), ""), TEXT[:1])

    def work():
        changes = [_change(prepared, probe, name, plan) for name, plan in plans.items()]
        divergence_shares(prepared.runner, changes, TEXT[:1], Silent())

    looking = planning.looking_for(
        prepared, Wish(budget="5bits", **HALVED), {}, (), "hessian", Candidates(Cache(None), "")
    )
    seen = search_foresight(prepared, replace(looking, graphs=16))
    foreseen = _Running(seen, seen.passes, Economy())._graph()
    assert foreseen == pytest.approx(sampled(work).bytes, rel=0.3)


def loss_change(probe, windows, names):
    """Excess cross-entropy, nats per byte, with the layers of these names in 2 bits."""
    low, kept = LayerPlan(bits=2, group=64), LayerPlan()
    plans = {name: low if name in names else kept for name in probe.found.layers}
    seen = probe.compared(plans, windows)
    assert seen.perplexity_before is not None
    return math.log(seen.perplexity) - math.log(seen.perplexity_before)


def lowered_share(order, counts, keeps):
    """Share of all weights in the longest start of an order that keeps a target, by halving."""
    low, high, trials = 0, len(order), 0
    while low < high:
        middle = (low + high + 1) // 2
        trials += 1
        low, high = (middle, high) if keeps(order[:middle]) else (low, middle - 1)
    assert trials <= math.ceil(math.log2(len(order) + 1))
    return sum(counts[name] for name in order[:low]) / sum(counts.values())


@functools.cache
def lowered_shares():
    """What orders lower of 21 linears in 2 bits, the loss on other text up by 0.05 nats at most."""
    assets = Path(os.environ["LAYERWISE_ASSETS"])
    opened = lw.open(assets / "models/bytes-wikitext")
    text = "text/wikitext2"
    texts = Texts(str(assets / text / "valid.txt"), 24, 64, str(assets / text / "test.txt"), 128)
    prepared = prepare(opened.source, opened.structure, [], texts, needing=["a test"])
    runner, calibration, heldout = prepared.runner, prepared.calibration, prepared.heldout
    assert runner is not None
    assert calibration is not None
    assert heldout is not None
    probe = Probe(prepared, "layerwise", {}, Candidates(Cache(None), ""), heldout.ids)
    names = list(opened.structure.layers)
    assert len(names) == 21
    counts = {name: opened.structure.layers[name].count for name in names}
    low = LayerPlan(bits=2, group=64)
    changes = [_change(prepared, probe, name, low) for name in names]
    found = divergence_shares(runner, changes, calibration.ids, Silent())
    alone = torch.cat(
        [divergence_shares(runner, [change], calibration.ids, Silent()) for change in changes]
    )
    distances = torch.tensor([float(change.delta.square().sum()) for change in changes])
    noise = torch.Generator().manual_seed(0)
    chances = [torch.rand(len(names), generator=noise) for _ in range(5)]

    def share(scores):
        order = [names[n] for n in scores.argsort().tolist()]
        return lowered_share(
            order, counts, lambda start: loss_change(probe, heldout, set(start)) <= 0.05
        )

    sizes = torch.tensor([counts[name] for name in names])
    return {
        "shares": share(found),
        "shares for each weight": share(found / sizes),
        "diagonal": share(alone),
        "diagonal for each weight": share(alone / sizes),
        "weights' errors": share(distances),
        "chance": sum(map(share, chances)) / len(chances),
    }


@pytest.mark.trained
def test_the_order_of_what_a_weight_loses_beats_weights_errors_and_chance():
    figures = lowered_shares()
    assert figures["shares for each weight"] >= figures["weights' errors"] + 0.1
    assert figures["shares for each weight"] >= figures["chance"] + 0.1
    assert figures["shares for each weight"] >= figures["diagonal for each weight"] - 0.05


@pytest.mark.trained
@pytest.mark.xfail(
    reason="does not hold: 0.39 of the weights, and 0.46 by the diagonal alone", strict=False
)
def test_the_order_of_shares_alone_lowers_no_less_than_the_diagonal():
    figures = lowered_shares()
    assert figures["shares"] >= figures["diagonal"] - 0.05
