"""What a run will take, and how it keeps within a limit: both before it starts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from layerwise import export
from layerwise.core import memory
from layerwise.core.economy import LAVISH, Economy, memory_limit, shown
from layerwise.core.errors import UserError
from layerwise.core.keeping.candidates import Candidates
from layerwise.core.plan import Plan
from layerwise.core.reading.text import Windows
from layerwise.core.telling.forecast import LOAD_BACK, Forecast, Foresight, Outlook, Passes
from layerwise.core.telling.sample import sampled
from layerwise.evaluate.text import compare
from layerwise.flow.foreseeing import Looking, SearchForesight
from layerwise.flow.preparing import PROOF_WINDOWS, Prepared

# Beside the tensors that a forecast counts, libraries hold buffers and the allocator leaves gaps:
# 7.0% at most in all that benchmarks/memory.py has measured.
_MARGIN = 1.08
# What the process holds when it foresees a run moves by less than this from one time to the next:
# a limit that is named must hold the next time too.
_SWAY = memory.GAPS_BYTES
_TOKENS, _VOCABULARY = 64, 512  # of a comparison whose memory is looked at
_Outlook = TypeVar("_Outlook", bound=Outlook)
# Activations in the original and in the transformed model, in float32.
_STATES = 2


def foresight(
    prepared: Prepared,
    plan: Plan,
    size: int,
    *,
    apart: int = 0,
    before: int | None = None,
    candidates: Candidates | None = None,
) -> Foresight:
    """Measure what carrying out a plan takes, if its output has this size in bytes.

    Args:
        prepared: The model.
        plan: What will be done.
        size: Bytes of the output's weight files.
        apart: Windows with which each layer is looked at alone afterwards.
        before: The most memory that was held, or foreseen, before the run; None for what was held.
        candidates: What is kept of layers: where all are, no calibration is needed.
    """
    shown = prepared
    if candidates is not None and _kept(prepared, plan, candidates):
        shown = replace(prepared, calibration=None)
    passes, heldout = _passes(shown), prepared.heldout
    if passes is not None and heldout is not None:
        passes = replace(
            passes,
            proof=min(PROOF_WINDOWS, len(heldout.ids)),
            comparing=comparing(prepared.noise_floor),
            floor=prepared.noise_floor,
            apart=min(apart, len(heldout.ids)),
        )
    return Foresight(
        prepared.source,
        prepared.found,
        plan,
        export.get(plan.format, prepared.source, plan.options),
        size=size,
        beside=sum(file.stat().st_size for file in prepared.source.companions),
        passes=passes,
        before=memory.peak_bytes() if before is None else before,
    )


def _kept(prepared: Prepared, plan: Plan, candidates: Candidates) -> bool:
    """Whether every layer of a plan was made before."""
    layers = prepared.found.layers
    return prepared.heldout is not None and all(
        not one.steps
        or (plan.inputs == "original" and candidates.has(layers[name], one, plan.options))
        for name, one in plan.layers.items()
    )


def search_foresight(prepared: Prepared, looking: Looking) -> SearchForesight:
    """Measure what looking for a plan takes."""
    return SearchForesight(prepared, looking, _passes(prepared))


def _passes(prepared: Prepared) -> Passes | None:
    """The windows that go through a model, none of them for a proof; None if none do."""
    calibration, heldout = prepared.calibration, prepared.heldout
    if prepared.runner is None or not (calibration or heldout):
        return None
    return Passes(
        runner=prepared.runner,
        calibration=calibration.ids if calibration else None,
        heldout=heldout.ids if heldout else None,
        states=_STATES,
        proof=0,
        comparing=0.0,
    )


def comparing(floor: bool) -> float:
    """Bytes that a comparison holds for each logit."""
    windows = Windows(torch.zeros(1, _TOKENS, dtype=torch.long), "")

    def work() -> None:
        answers = ([torch.zeros(1, _TOKENS, _VOCABULARY)] for _ in range(3))
        compare(windows, [next(answers) for _ in range(1 + floor)], next(answers))

    return sampled(work).bytes / (_TOKENS * _VOCABULARY * torch.float32.itemsize)


def promised(seen: Foresight, limit: str, *, later: bool = False) -> tuple[Economy, Forecast]:
    """How a run is carried out, and what it takes, within a limit of memory if there is one.

    Args:
        seen: What was measured of it.
        limit: The most memory that may be held; "" for no limit.
        later: Other work comes first, after which the same must be found again.

    Raises:
        UserError: It cannot be kept; the message names the least that can.
    """
    if limit and "bias" in seen.plan.tune and seen.passes is not None and seen.passes.runner.whole:
        raise UserError(
            "what it takes to learn the biases of a model that runs as a whole is not foreseen, so "
            "no limit of memory can be promised.",
            "Leave out --max-memory, or bias of --tune.",
        )
    return fitting(seen.forecast, seen.economies(), limit, "the run", _SWAY if later else 0)


def promised_search(
    seen: SearchForesight, limit: str, afterwards: int = 0
) -> tuple[Economy, Outlook]:
    """The same of looking for a plan, which takes at least so much to carry out afterwards."""
    work = "looking for a plan"
    return fitting(seen.forecast, seen.economies(), limit, work, afterwards=afterwards)


def least(seen: Foresight) -> int:
    """The smallest limit that a run can keep."""
    return _needed(seen.forecast(seen.economies()[-1])) + _SWAY


def fitting(
    forecast: Callable[[Economy], _Outlook],
    economies: Sequence[Economy],
    limit: str,
    work: str,
    sway: int = 0,
    *,
    afterwards: int = 0,
) -> tuple[Economy, _Outlook]:
    """The first economy that keeps a limit, with what is foreseen of it.

    Args:
        forecast: Foresees some work.
        economies: Ways to do it, each with less memory than the one before.
        limit: The most memory that may be held; "" for no limit.
        work: What it is called.
        sway: What must be left over.
        afterwards: What must be allowed for work that follows.

    Raises:
        UserError: None does.
    """
    foreseen = forecast(LAVISH)
    if not limit:
        return LAVISH, foreseen
    most = memory_limit(limit)
    for economy in economies:
        foreseen = forecast(economy)
        if _needed(foreseen) + sway <= most:
            return economy, foreseen
    needed, proof = _needed(foreseen) + _SWAY, ""
    if foreseen.fullest in LOAD_BACK:
        rest = _needed(foreseen, without=LOAD_BACK) + _SWAY
        proof = f" Without the proof it needs {shown(rest)}: --proof none --max-memory that."
    raise UserError(
        f"{work} needs at least {shown(needed)} of memory, and {limit} is allowed: "
        f"{foreseen.fullest} takes that much.",
        f"Give --max-memory {shown(max(needed, afterwards))} or more.{proof}",
    )


def _needed(foreseen: Outlook, without: frozenset[str] = frozenset()) -> int:
    held = [size for stage, size in foreseen.stages.items() if stage not in without]
    return math.ceil(_MARGIN * max(held))
