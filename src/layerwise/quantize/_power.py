"""Points that are powers of whole numbers: dense near 0.0 for an exponent below 1."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.results import SCALE_DTYPE, Quantized, middle
from layerwise.quantize._grid import storable


def power_points(bits: int, exponent: float) -> Float[Tensor, " codes"]:
    """What codes stand for, in units of the largest weight, 0.0 at code 2^(bits - 1).

    The whole number q = code - 2^(bits - 1), of which the largest is m = 2^(bits - 1) - 1, is

        sign(q) (|q| / m)^(1 / exponent)

    The first code, of which -m - 1 would come, is never used.
    """
    whole = torch.arange(2**bits) - 2 ** (bits - 1)
    sizes = (whole.double().abs() / (2 ** (bits - 1) - 1)).pow(1 / exponent)
    return (whole.sign() * sizes).float()


def power_steps(
    grouped: Float[Tensor, "*grids group"],
    scale: Float[Tensor, "*grids"],
    bits: int,
    exponent: float,
) -> Float[Tensor, "*grids group"]:
    """What is rounded to q, sign(w) m (|w| / scale)^exponent."""
    most = 2 ** (bits - 1) - 1
    return (grouped.abs() / scale[..., None]).pow_(exponent).mul_(most).mul_(grouped.sign())


def power_codes(
    grouped: Float[Tensor, "*grids group"],
    scale: Float[Tensor, "*grids"],
    bits: int,
    exponent: float,
) -> Float[Tensor, "*grids group"]:
    """Codes q + 2^(bits - 1) of the nearest whole q, with |q| at most m."""
    most = 2 ** (bits - 1) - 1
    steps = power_steps(grouped, scale, bits, exponent)
    return steps.round_().clamp_(-most, most).add_(2 ** (bits - 1))


def power_scale(grouped: Float[Tensor, "*grids group"]) -> Float[Tensor, "*grids"]:
    """The largest magnitude of each group, rounded up to what is stored.

    Raises:
        UserError: A weight is NaN or infinite.
    """
    return storable(grouped.abs().amax(dim=-1))


def power_pack(
    codes: Float[Tensor, "out padded"],
    scale: Float[Tensor, "out groups"],
    *,
    width: int,
    bits: int,
    group: int,
    symmetric: bool,
    exponent: float,
    notes: tuple[str, ...] = (),
) -> Quantized:
    """Codes on powers as they are stored; codes past `width` only filled up the last group."""
    return Quantized(
        codes[:, :width].to(torch.uint8),
        scale.to(SCALE_DTYPE),
        middle(scale, bits),
        bits=bits,
        group=group,
        symmetric=symmetric,
        points=power_points(bits, exponent),
        notes=notes,
    )


def check_exponents(bits: int, lowest: float, highest: float) -> None:
    """Refuse options that describe no powers.

    Raises:
        UserError: `bits` is not from 2 to 8, or no exponent of 0.1 or more is from `lowest` to
            `highest`.
    """
    if not 2 <= bits <= 8:
        raise UserError(f"bits is {bits}.", "Give bits from 2 to 8.")
    if not 0.1 <= lowest <= highest < math.inf:
        raise UserError(
            f"exponents go from {lowest} to {highest}.",
            "Give a lowest of 0.1 or more, and a highest that is not below it.",
        )


def best_exponent(
    grouped: Float[Tensor, "*grids group"],
    scale: Float[Tensor, "*grids"],
    bits: int,
    lowest: float,
    highest: float,
    step: float = 0.05,
    norm: float = 2.0,
) -> float:
    """The exponent on an even grid by which sum |w - Q(w)|^norm is least."""
    least, best = math.inf, lowest
    for number in range(int((highest - lowest) / step + 1e-6) + 1):
        exponent = lowest + number * step
        codes = power_codes(grouped, scale, bits, exponent)
        error = _lost(grouped, scale, codes, power_points(bits, exponent), norm)
        if error < least:
            least, best = error, exponent
    return best


def _lost(
    grouped: Float[Tensor, "*grids group"],
    scale: Float[Tensor, "*grids"],
    codes: Float[Tensor, "*grids group"],
    points: Float[Tensor, " codes"],
    norm: float,
) -> float:
    """Sum of |w - Q(w)|^norm, in units of the largest scale, in which no power overflows."""
    error = points[codes.int()].mul_(scale[..., None]).sub_(grouped)
    return float((error / scale.max()).abs_().pow_(norm).sum(dtype=torch.float64))
