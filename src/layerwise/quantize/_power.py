"""Points that are powers of whole numbers: dense near 0.0 for an exponent below 1."""

import torch
from jaxtyping import Float
from torch import Tensor

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


def power_codes(
    grouped: Float[Tensor, "*grids group"],
    scale: Float[Tensor, "*grids"],
    bits: int,
    exponent: float,
) -> Float[Tensor, "*grids group"]:
    """Codes q + 2^(bits - 1) with q = sign(w) round(m (|w| / scale)^exponent)."""
    most = 2 ** (bits - 1) - 1
    sizes = (grouped.abs() / scale[..., None]).pow_(exponent).mul_(most).round_().clamp_(max=most)
    return sizes.mul_(grouped.sign()).add_(2 ** (bits - 1))


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
