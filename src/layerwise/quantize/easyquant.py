"""EasyQuant: keep the few weights beyond n sigma, then search each row's scale for the rest."""

import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.results import Outliers, Quantized, outlier_room
from layerwise.core.verbs import quantizer
from layerwise.quantize._grid import by_group, check_grid, fit, pack, storable

_BETA1, _BETA2 = 0.9, 0.999
# A scale never shrinks below this share of the one it began at.
_LEAST = 0.1

_SOURCE = "table 1: perplexity of LLaMA at 4 bits, nearer to the original than rounding is"
_ROWS = {"group": 0, "symmetric": True}


@quantizer(
    Paper("EasyQuant: An Efficient Data-free Quantization Algorithm for LLMs", 2023, "2403.02775"),
    claims=(
        Claim("rtn", "bytes-wikitext/quantize", _ROWS | {"bits": 3}, 0.4, _SOURCE),
        Claim("rtn", "bytes-wikitext/quantize", _ROWS | {"bits": 4}, 0.4, _SOURCE),
        Claim("rtn", "reference-6m/quantize", _ROWS | {"bits": 3}, 0.4, _SOURCE),
    ),
    codes="outliers",
    widths=range(2, 9),
)
def easyquant(
    weight: Float[Tensor, "out in"],
    *,
    bits: int,
    group: int = 0,
    symmetric: bool = True,
    outliers: float = 0.01,
    sigmas: float = 3.0,
    steps: int = 200,
    rate: float = 0.005,
) -> Quantized:
    """Keep the weights beyond n sigma as they are, and descend on the scale of all others.

    A narrower range has finer steps, but clips the few large weights that matter most.  So these
    are taken out first (section 3.1), by the mean and deviation of the whole layer:

        outlier:  |w - mean(W)| > n std(W)

    and what is left of each row, x, is rounded on a symmetric grid

        Q(x) = s clamp(round(x / s), -top, top),    top = 2^(bits - 1) - 1           (eq. 1)

    that begins at s = max|x| / top and follows Adam down the reconstruction error, whose
    derivative is exact wherever no code changes (section 3.2):

        d |Q(x) - x|^2 / ds = 2 sum (Q(x) - x) clamp(round(x / s), -top, top)

    The error jumps where codes change, so the best scale that was met is kept, not the last.

    Unlike the paper, a step is a share of the scale that a row began at, so that nothing depends
    on the unit of the weights; and where more weights lie beyond n sigma than there is room for,
    the farthest are kept.  The paper prints var(W) and a largest code of 2^(bits - 1); its text
    shows that the deviation and a symmetric range are meant.  With `symmetric` off the range of
    x is as in `rtn`, and shrinks around 0.0.

    Args:
        weight: Layer to quantize.
        bits: Width of a code, from 2 to 8.
        group: Inputs that share a scale; 0 is the whole row.
        symmetric: Centre every grid on 0.0, so that no zero points are stored.
        outliers: Largest fraction of the weights that is kept, in 16 bits, from 0 to below 1.
        sigmas: Deviations n from the mean that make an outlier.
        steps: Steps of Adam; 0 keeps the first scale.
        rate: Length of one, as a share of the first scale.

    Returns:
        Codes and outliers.  A note says how many outliers there was no room for.

    Raises:
        UserError: An option is out of range, or the weight holds NaN or infinity.
    """
    group = group or weight.shape[1]
    check_grid(weight, bits, group)
    _check(bits, outliers, sigmas, steps, rate)
    kept, missed = _beyond(weight, sigmas, outlier_room(weight.numel(), outliers))
    grouped = by_group(weight.float().masked_fill(kept, 0.0), group)  # (out, groups, group)
    scale, zero = fit(grouped, bits, symmetric)
    low, high = -zero, 2**bits - 1 - zero
    if symmetric:
        high = torch.full_like(zero, 2 ** (bits - 1) - 1)
        low = -high
        scale = storable(grouped.abs().amax(dim=-1) / high)
    scale = _descend(grouped, scale, low, high, steps, rate)
    codes = _rounded(grouped, scale, low, high) + zero[..., None]
    notes = (f"{missed} weights beyond {sigmas:g} sigma found no room",) if missed else ()
    width = weight.shape[1]
    made = pack(
        codes.flatten(1), scale, zero, width=width, bits=bits, group=group, symmetric=symmetric
    )
    return replace(made, outliers=Outliers.of(kept, weight), notes=notes)


def _check(bits: int, outliers: float, sigmas: float, steps: int, rate: float) -> None:
    if not 2 <= bits <= 8:
        raise UserError(f"bits is {bits}.", "Give bits from 2 to 8.")
    if not 0 <= outliers < 1 or not sigmas > 0:
        raise UserError(
            f"outliers is {outliers}, sigmas is {sigmas}.",
            "Give a fraction of outliers from 0 to below 1, sigmas above 0.",
        )
    if steps < 0 or not 0 < rate < math.inf:
        raise UserError(
            f"steps is {steps}, rate is {rate}.", "Give steps of 0 or more, a rate above 0."
        )


def _beyond(
    weight: Float[Tensor, "out in"], sigmas: float, room: int
) -> tuple[Bool[Tensor, "out in"], int]:
    """The weights beyond so many deviations, the farthest of them, and how many had no room."""
    values = weight.double()
    distance = (values - values.mean()).abs()
    beyond = distance > sigmas * values.std(correction=0)
    count = int(beyond.sum())
    if count > room:
        farthest = distance.flatten().argsort(descending=True, stable=True)[:room]
        beyond = torch.zeros_like(beyond).flatten().index_fill_(0, farthest, True)
    return beyond.reshape(weight.shape), max(0, count - room)


def _rounded(
    grouped: Float[Tensor, "*grids group"],
    scale: Float[Tensor, "*grids"],
    low: Float[Tensor, "*grids"],
    high: Float[Tensor, "*grids"],
) -> Float[Tensor, "*grids group"]:
    """clamp(round(x / s), low, high), whole numbers."""
    codes = (grouped / scale[..., None]).round_()
    return codes.clamp_(low[..., None], high[..., None])


def _descend(
    grouped: Float[Tensor, "*grids group"],
    start: Float[Tensor, "*grids"],
    low: Float[Tensor, "*grids"],
    high: Float[Tensor, "*grids"],
    steps: int,
    rate: float,
) -> Float[Tensor, "*grids"]:
    """The scale with the least error that Adam meets, of those that can be stored."""
    best, least = start, torch.full_like(start, math.inf)
    share = torch.ones_like(start)  # of the first scale
    first, second = torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, steps + 2):
        scale = storable(share * start)
        codes = _rounded(grouped, scale, low, high)
        error = codes * scale[..., None] - grouped
        loss = error.square().sum(dim=-1)
        best = scale.where(loss < least, best)
        least = torch.minimum(loss, least)
        # In units of the first scale, so that Adam's own epsilon is one of shares.
        slope = 2 * (error * codes).sum(dim=-1) / start
        first = _BETA1 * first + (1 - _BETA1) * slope
        second = _BETA2 * second + (1 - _BETA2) * slope.square()
        # A slope that was always 0.0 moves nothing.
        size = (second / (1 - _BETA2**step)).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        share = (share - rate * first / (1 - _BETA1**step) / size).clamp(min=_LEAST)
    return best
