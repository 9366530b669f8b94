"""What a run will take, and how it keeps within a limit: both before it starts."""

import math

import torch

from layerwise import export
from layerwise.core.economy import LAVISH, Economy, memory_limit, shown
from layerwise.core.errors import UserError
from layerwise.core.forecast import LOAD_BACK, Forecast, Foresight, Passes
from layerwise.core.plan import Plan
from layerwise.core.sample import sampled
from layerwise.core.text import Windows
from layerwise.evaluate.text import compare
from layerwise.flow.preparing import PROOF_WINDOWS, Prepared

# Beside the tensors that a forecast counts, libraries hold buffers and the allocator leaves gaps.
_MARGIN = 1.05
_TOKENS, _VOCABULARY = 64, 512  # of a comparison whose memory is looked at
# Activations in the original and in the transformed model, in float32.
_STATES = 2


def foresight(prepared: Prepared, plan: Plan, size: int, *, apart: int = 0) -> Foresight:
    """Measure what carrying out a plan takes, if its output has this size in bytes.

    Args:
        prepared: The model.
        plan: What will be done.
        size: Bytes of the output's weight files.
        apart: Windows with which each layer is looked at alone afterwards.
    """
    calibration, heldout = prepared.calibration, prepared.heldout
    passes = None
    if prepared.runner is not None and (calibration or heldout):
        passes = Passes(
            runner=prepared.runner,
            calibration=calibration.ids if calibration else None,
            heldout=heldout.ids if heldout else None,
            states=_STATES,
            proof=min(PROOF_WINDOWS, len(heldout.ids)) if heldout else 0,
            comparing=_comparing(prepared.noise_floor) if heldout else 0.0,
            floor=prepared.noise_floor,
            apart=min(apart, len(heldout.ids)) if heldout else 0,
        )
    return Foresight(
        prepared.source,
        prepared.found,
        plan,
        export.get(plan.format, prepared.source, plan.options),
        size=size,
        beside=sum(file.stat().st_size for file in prepared.source.companions),
        passes=passes,
    )


def _comparing(floor: bool) -> float:
    """Bytes that a comparison holds for each logit."""
    windows = Windows(torch.zeros(1, _TOKENS, dtype=torch.long), "")

    def work() -> None:
        answers = ([torch.zeros(1, _TOKENS, _VOCABULARY)] for _ in range(3))
        compare(windows, [next(answers) for _ in range(1 + floor)], next(answers))

    return sampled(work).bytes / (_TOKENS * _VOCABULARY * torch.float32.itemsize)


def promised(seen: Foresight, limit: str) -> tuple[Economy, Forecast]:
    """How a run is carried out, and what it takes, within a limit of memory if there is one.

    Raises:
        UserError: It cannot be kept; the message names the least that can.
    """
    foreseen = seen.forecast()
    if not limit:
        return LAVISH, foreseen
    most = memory_limit(limit)
    for economy in seen.economies():
        foreseen = seen.forecast(economy)
        if _needed(foreseen) <= most:
            return economy, foreseen
    least, proof = _needed(foreseen), ""
    if foreseen.fullest in LOAD_BACK:
        rest = _needed(foreseen, without=LOAD_BACK)
        proof = f" Without the proof it needs {shown(rest)}: --proof none --max-memory that."
    raise UserError(
        f"the run needs at least {shown(least)} of memory, and {limit} is allowed: "
        f"{foreseen.fullest} takes that much.",
        f"Give --max-memory {shown(least)} or more.{proof}",
    )


def _needed(foreseen: Forecast, without: frozenset[str] = frozenset()) -> int:
    held = [size for stage, size in foreseen.stages.items() if stage not in without]
    return math.ceil(_MARGIN * max(held))
