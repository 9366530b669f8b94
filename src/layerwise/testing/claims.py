"""Claims of papers, checked on trained models that are at hand; see `benches`."""

import json
import math
import multiprocessing
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from datetime import date

import torch

from layerwise.core import catalogue
from layerwise.core.catalogue import Claim, Method
from layerwise.core.progress import Progress
from layerwise.testing.benches import bench_loss, is_here

HOLDS, FAILS, NOT_HERE = "holds", "does not hold", "not checked: LAYERWISE_ASSETS is not set"
NOT_REACHED = "not checked: the time was up"
NO_REGIME = "no regime: the baseline loses nothing"
CLOSE = "too close to tell"
# Figures move by less than this fraction of themselves from machine to machine: sums of floats in
# another order.  Those of codes that are learned go further: many small steps follow each other
# (auto against signround at 3 bits was 1.06 on one machine and below 1.02 on another).
_NOISE, _LEARNED_NOISE = 0.02, 0.06
# Claims by which the first one moves on each day.
_DAILY = 37


@dataclass(frozen=True, slots=True)
class Verdict:
    """A claim and what was found.

    Attributes:
        method: The method that makes it.
        beats: The baseline.
        bench: Model and verb.
        options: Options of both, as text.
        margin: Fraction by which the loss must be lower.
        loss: Of the method; None if the model is not here.
        baseline: Of the baseline.
        verdict: Whether the claim holds; it does not where the baseline loses nothing, and nobody
            can tell where another machine's sums could turn it.
        source: Where the paper makes it.
    """

    method: str
    beats: str
    bench: str
    options: str
    margin: float
    loss: float | None
    baseline: float | None
    verdict: str
    source: str


@dataclass(frozen=True, slots=True)
class _Run:
    """What is run to check a claim: one method on one bench; `options` are JSON."""

    model: str
    verb: str
    method: str
    options: str

    def loss(self) -> float:
        """What it loses; lower is better."""
        return bench_loss(self.model, self.verb, self.method, json.loads(self.options))


def check_claims(
    ids: Sequence[str], progress: Progress, processes: int = 1, minutes: float = math.inf
) -> list[Verdict]:
    """Check the claims of some methods, or of all.

    Args:
        ids: Methods; empty for all.
        progress: Is told of each run.
        processes: Run so many at once, each on one thread.
        minutes: Begin no run after so many.  Which claims come first moves on from day to day, so
            that all have their turn.
    """
    chosen = (
        [catalogue.get(id) for id in ids]
        if ids
        else [method for verb in catalogue.VERBS for method in catalogue.methods(verb)]
    )
    pairs = [(method, claim) for method in chosen for claim in method.claims]
    first = date.today().toordinal() * _DAILY % len(pairs) if pairs and minutes < math.inf else 0
    turned = pairs[first:] + pairs[:first]
    runs = dict.fromkeys(run for pair in turned for run in _runs(*pair) if is_here(run.model))
    progress.stage("claims", len(runs))
    losses: dict[_Run, float] = {}
    for run, loss in _losses(runs, processes, time.monotonic() + 60 * minutes):
        losses[run] = loss
        progress.step(f"{run.verb}/{run.method}")
    return [_verdict(method, claim, losses) for method, claim in pairs]


def _losses(runs: Iterable[_Run], processes: int, until: float) -> Iterator[tuple[_Run, float]]:
    """Of those runs that could begin before a time."""
    waiting = iter(runs)
    if processes == 1:
        while time.monotonic() < until and (run := next(waiting, None)):
            yield run, run.loss()
        return
    # What was forked would hold locks of threads that it does not have.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        going: dict[Future[float], _Run] = {}
        while True:
            while len(going) < processes and time.monotonic() < until:
                if (run := next(waiting, None)) is None:
                    break
                going[pool.submit(run.loss)] = run
            if not going:
                return
            for one in wait(going, return_when=FIRST_COMPLETED).done:
                yield going.pop(one), one.result()


def _runs(method: Method, claim: Claim) -> tuple[_Run, _Run]:
    """That of the method, and that of what it is to beat."""
    model, _, verb = claim.bench.partition("/")
    options = json.dumps(claim.options, sort_keys=True)
    return _Run(model, verb, method.name, options), _Run(model, verb, claim.beats, options)


def _verdict(method: Method, claim: Claim, losses: Mapping[_Run, float]) -> Verdict:
    options = " ".join(f"{name} {value}" for name, value in claim.options.items())
    found = (method.id, claim.beats, claim.bench, options, claim.margin)
    ours, theirs = _runs(method, claim)
    if not {ours, theirs} <= losses.keys():
        missing = NOT_REACHED if is_here(ours.model) else NOT_HERE
        return Verdict(*found, None, None, missing, claim.source)
    loss, baseline = losses[ours], losses[theirs]
    learned = any(_learns(run) for run in (ours, theirs))
    verdict = judged(loss, baseline, claim.margin, _LEARNED_NOISE if learned else _NOISE)
    return Verdict(*found, loss, baseline, verdict, claim.source)


def _learns(run: _Run) -> bool:
    if run.verb == "recover":
        return True
    return run.verb == "quantize" and catalogue.get(f"quantize/{run.method}").learns is not None


def judged(loss: float, baseline: float, margin: float, noise: float) -> str:
    """Whether a loss is below a baseline's by a margin; `noise` is a fraction of what it may be."""
    if baseline <= 0:  # a fraction less would be more
        return NO_REGIME
    over = loss / baseline - (1 - margin)
    if abs(over) < noise * (1 - margin):
        return CLOSE
    return HOLDS if over < 0 else FAILS
