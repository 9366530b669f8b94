"""PowerQuant: even steps of a power of the weights, with the exponent that loses a layer least."""

import math

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.results import Quantized
from layerwise.core.verbs import quantizer
from layerwise.quantize._grid import by_group, check_grid
from layerwise.quantize._power import (
    best_exponent,
    check_exponents,
    power_codes,
    power_pack,
    power_scale,
)

_SOURCE = "data-free tables: exponents that are searched against even steps (exponent 1)"
_ROWS = {"group": 0, "symmetric": True}


@quantizer(
    Paper("PowerQuant: Automorphism Search for Non-Uniform Quantization", 2023, "2301.09858"),
    claims=(
        Claim("rtn", "bytes-wikitext/quantize", _ROWS | {"bits": 3}, 0.0, _SOURCE),
        Claim("rtn", "bytes-wikitext/quantize", _ROWS | {"bits": 4}, 0.0, _SOURCE),
        Claim("rtn", "reference-6m/quantize", _ROWS | {"bits": 3}, 0.0, _SOURCE),
    ),
    codes="points",
    widths=range(2, 9),
)
def powerquant(
    weight: Float[Tensor, "out in"],
    *,
    bits: int,
    group: int = 0,
    symmetric: bool = True,
    lowest: float = 0.2,
    highest: float = 1.2,
    step: float = 0.05,
    norm: float = 2.0,
) -> Quantized:
    """Round a power of each weight to even steps, the exponent chosen for the layer.

    Powers are the only continuous maps of the positive numbers that keep products, so that codes
    of weights and inputs could be multiplied as such.  With an exponent a below 1 the values
    that codes stand for lie densely near 0.0, where most weights are:

        m = 2^(bits - 1) - 1,    s = max|w|^a / m
        q = sign(w) round(|w|^a / s),    Q(w) = sign(q) (|q| s)^(1 / a)

    The exponent is the same for the whole layer, and is the one on an even grid that loses least,

        a* = argmin_a sum |w - Q_a(w)|^norm

    which needs no data.  At a = 1 this is rounding to nearest on a symmetric grid without its
    lowest code; the sign keeps 0.0 apart, so there are no zero points.

    Unlike the paper, which searches one exponent for a network, each layer has its own.  It divides
    by max|w|^a where weights are divided by max|w| first, which is the same and cannot overflow;
    and that maximum is rounded up to 16 bits before codes are chosen.  The paper searches with
    Nelder-Mead; a grid finds the same to half of its step.

    Args:
        weight: Layer to quantize.
        bits: Width of a code, from 2 to 8.
        group: Inputs that share a scale; 0 is the whole row.
        symmetric: Store no zero points.  Powers lie alike on both sides of 0.0 either way.
        lowest: First exponent to try, 0.1 or more.
        highest: Last one.
        step: Between two of them.
        norm: Power of the errors whose sum is least.

    Returns:
        Codes, with what each stands for.  A note says which exponent was chosen.

    Raises:
        UserError: An option is out of range, or the weight holds NaN or infinity.
    """
    group = group or weight.shape[1]
    check_grid(weight, bits, group)
    check_exponents(bits, lowest, highest)
    if not (0 < step < math.inf and 0 < norm < math.inf):
        raise UserError(
            f"step is {step}, norm is {norm}.",
            "Give a step between exponents above 0, and a power of the errors above 0, such as 2.",
        )
    grouped = by_group(weight, group)  # (out, groups, group)
    scale = power_scale(grouped)
    best = best_exponent(grouped, scale, bits, lowest, highest, step, norm)
    return power_pack(
        power_codes(grouped, scale, bits, best).flatten(1),
        scale,
        width=weight.shape[1],
        bits=bits,
        group=group,
        symmetric=symmetric,
        exponent=best,
        notes=(f"exponent {best:.3g}",),
    )
