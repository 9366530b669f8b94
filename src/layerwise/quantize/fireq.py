"""FireQ: 4-bit weights whose scales are 8-bit floats, for inputs that are 8-bit floats."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.activation import Activation
from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.results import FLOAT8_DTYPE, SCALE_DTYPE, Quantized, middle
from layerwise.core.verbs import quantizer
from layerwise.quantize._grid import by_group, check_grid, storable

_LARGEST = torch.finfo(FLOAT8_DTYPE).max  # 448
_LEAST = 2.0**-9  # the smallest 8-bit float above 0.0
_TOP, _ZERO = 7, 8  # the largest code, less the code of 0.0
# Above it, the least scale would be too small for its 16 bits.
_MOST_POWER = 117
# A column that is all but dead is not brought up to the others.
_MOST_SCALE = 1e4

_OPTIONS = {"bits": 4, "group": 64, "symmetric": True, "activation": "fp8"}
_SOURCE = "abstract: channel-wise scaling keeps the accuracy of INT4-FP8, Llama-2-7B, Llama-3-8B"


@quantizer(
    Paper(
        "FireQ: Fast INT4-FP8 Kernel and RoPE-aware Quantization for LLM Inference Acceleration",
        2025,
        "2505.20839",
    ),
    claims=(Claim("rtn", "bytes-wikitext-outliers/quantize", _OPTIONS, 0.3, _SOURCE),),
    rows="input",
    widths=(4,),
    activates="fp8",
)
def fireq(
    weight: Float[Tensor, "out in"],
    *,
    bits: int = 4,
    group: int = 128,
    symmetric: bool = True,
    fold: bool = True,
    scaling: bool = True,
) -> Quantized:
    """Round to nearest after evening out columns, on grids whose scales are 8-bit floats.

    Columns are evened out without data: what feeds the layer is divided by

        f_j = c / mean over rows of |W[:, j]|,    W[:, j] <- W[:, j] f_j

    and the mean of |W| serves as c, so that the layer keeps its size.  A group's scale is an E4M3
    float, times one power of two for the whole matrix:

        s = max(E4M3(t max|w| / 7), 2^-9),    code = clamp(round(t w / s), -8, 7)
        w = s code / t,                       t = 2^floor(log2(448 / max|W|))

    Inputs are rounded to E4M3 with a scale for each token.  Codes are 8-bit floats as they are,
    so the product of a group is one of 8-bit floats, which s / t then multiplies.

    Unlike the authors' code, which takes the smallest t from 1 to 2^14 that lets no scale fall
    below 2^-9 if one can, we take the largest that keeps t W within 448, below 1 if it must be:
    nothing falls below for a larger t that would not for a smaller one, and scales near 2^-9 are
    coarse.  Unlike the authors' code, c is not set by hand for each layer: t and the scales
    of tokens take up any factor of the whole.  A scale is stored in 16 bits, which hold s / t
    exactly.  The scaling of keys for a 4-bit cache is a step of its own.

    Args:
        weight: All the layers that read one input, stacked by rows.
        bits: 4; there is no other.
        group: Inputs that share a scale; the last group of a row may be shorter.
        symmetric: Store no zero points; grids are centred on 0.0 either way.
        fold: Something that feeds the layers can be divided by f.
        scaling: Even out columns, where `fold` lets us.

    Returns:
        Codes of W diag(f), with f as `input_scale` where columns are evened out.

    Raises:
        UserError: An option is out of range, or the weight holds NaN or infinity.
    """
    if bits != 4:
        raise UserError(f"bits is {bits}.", "Give 4: FireQ's codes have no other width.")
    check_grid(weight, bits, group)
    scale = _evening(weight.float()) if fold and scaling else None
    scaled = weight.float() if scale is None else weight.float() * scale
    grouped = by_group(scaled, group)  # (out, groups, group)
    times = _power(grouped)
    steps = grouped.abs().amax(dim=-1) * (times / _TOP)
    steps = steps.clamp(max=_LARGEST).to(FLOAT8_DTYPE).float().clamp(min=_LEAST) / times
    codes = (grouped / steps[..., None]).round().clamp(-_TOP - 1, _TOP) + _ZERO
    return Quantized(
        codes.flatten(1)[:, : weight.shape[1]].to(torch.uint8),
        steps.to(SCALE_DTYPE),
        middle(steps, bits),
        bits=bits,
        group=group,
        symmetric=symmetric,
        input_scale=scale,
        activation=Activation("fp8"),
    )


def _evening(weight: Float[Tensor, "out in"]) -> Float[Tensor, " in"]:
    """f, with 1 for columns of zeros."""
    means = weight.abs().mean(dim=0)
    live = means > 0
    factor = weight.abs().mean() / means.where(live, 1.0)
    return factor.clamp(1 / _MOST_SCALE, _MOST_SCALE).where(live, 1.0)


def _power(weight: Float[Tensor, "*grids group"]) -> float:
    """t; 1 for a matrix of zeros.

    Raises:
        UserError: A weight is NaN or infinite.
    """
    largest = weight.abs().amax()
    storable(largest[None])  # refuses what is not finite
    # 448 / max = mantissa 2^exponent with a mantissa from 0.5 to 1.
    exponent = math.frexp(_LARGEST / float(largest))[1] - 1 if largest > 0 else 0
    return 2.0 ** min(exponent, _MOST_POWER)
