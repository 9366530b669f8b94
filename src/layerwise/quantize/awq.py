"""AWQ: enlarge the columns that large inputs meet before rounding, shrink them back after."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.results import Quantized
from layerwise.core.statistics import check_statistics
from layerwise.core.symmetric import squared_lengths
from layerwise.core.verbs import quantizer
from layerwise.quantize._grid import nearest

_LEAST_SCALE = 1e-4

_SOURCE = "abstract: less error than rounding where a few inputs are large, LLMs at 3 and 4 bits"


@quantizer(
    Paper(
        "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
        2023,
        "2306.00978",
    ),
    claims=(
        Claim("rtn", "bytes-wikitext-outliers/quantize", {"bits": 4, "group": 64}, 0.6, _SOURCE),
        Claim("rtn", "bytes-wikitext-outliers/quantize", {"bits": 3, "group": 64}, 0.15, _SOURCE),
    ),
    rows="input",
)
def awq(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    magnitude: Float[Tensor, " in"],
    *,
    bits: int,
    group: int = 128,
    symmetric: bool = False,
    grid: int = 20,
) -> Quantized:
    """Round to nearest after scaling each input by a power of its mean magnitude.

    A weight that meets large inputs should lose little.  Multiplying its column by s and
    dividing its input by s leaves the layer as it was, but divides that column's rounding
    error by s for as long as the grid of its group does not widen:

        Q(W diag(s)) diag(s)^-1 x,    s = mean|x|^alpha                            (eq. 2, 5)

    The exponent is searched on an even grid in [0, 1) for the least output error

        L(s) = || (Q(W diag(s)) diag(s)^-1 - W) X ||^2 = tr(E G E^T)                    (eq. 4)

    where alpha = 0 is rounding to nearest, so the search never does worse than that.  As in the
    authors' code, s is at least 1e-4 and then centred: s / sqrt(max(s) min(s)).

    Unlike the paper, the error is that of this matrix rather than of its whole attention or MLP
    module, and weights are not clipped before they are rounded.  Unlike the authors' code, an
    input that calibration never saw is scaled like the faintest one that it did see.  Unlike the
    authors' code, inputs come from blocks that are already transformed, unless the caller gives
    others.

    Args:
        weight: All the layers that read one input, stacked by rows.
        gram: Mean of x x^T over calibration tokens.
        magnitude: Mean of |x| over the same tokens.
        bits: Width of a code, from 1 to 16.
        group: Inputs that share a grid.
        symmetric: Centre every grid on 0.0, so that no zero points are stored.
        grid: Exponents to try, 1 or more.

    Returns:
        Codes of W diag(s), with s as `input_scale`; None where alpha = 0 won.

    Raises:
        UserError: An option is out of range, or a value is NaN or infinite.
    """
    if grid < 1:
        raise UserError(f"grid is {grid}.", "Give the number of exponents to try, 1 or more.")
    check_statistics(gram, magnitude)
    original, gram, magnitude = weight.float(), gram.float(), magnitude.float()

    best = nearest(original, bits, group, symmetric)
    least = _loss(best.dequantize() - original, gram)
    for step in range(1, grid):
        scale = _scale(magnitude, step / grid)
        rounded = nearest(original * scale, bits, group, symmetric)
        tried = replace(rounded, input_scale=scale)
        loss = _loss(tried.dequantize() - original, gram)
        if loss < least:
            best, least = tried, loss
    return best


def _scale(magnitude: Float[Tensor, " in"], alpha: float) -> Float[Tensor, " in"]:
    """mean|x|^alpha, centred on 1 between its extremes."""
    live = magnitude[magnitude > 0]
    if not len(live):
        return torch.ones_like(magnitude)
    scale = magnitude.clamp(min=float(live.amin())).pow(alpha).clamp(min=_LEAST_SCALE)
    return scale / (scale.amax() * scale.amin()).sqrt()


def _loss(error: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]) -> float:
    """Mean squared error of the outputs, tr(E G E^T), summed over outputs."""
    return float(squared_lengths(error, gram).sum(dtype=torch.float64))
