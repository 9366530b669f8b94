"""Grids of evenly spaced points, one per group of consecutive inputs of an output row."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from layerwise.core.errors import UserError
from layerwise.core.learning import rounded
from layerwise.core.results import SCALE_DTYPE, Quantized

MOST_BITS = 16
# Entries that are rounded in one go where several ranges are tried: they stay in the cache.
_AT_ONCE = 1 << 18


def check_grid(weight: Float[Tensor, "out in"], bits: int, group: int) -> None:
    """Refuse options that describe no grid.

    Raises:
        UserError: `bits` is not from 1 to 16, `group` is below 1 or the weight has no entries.
    """
    if not 1 <= bits <= MOST_BITS:
        raise UserError(f"bits is {bits}.", f"Give bits from 1 to {MOST_BITS}.")
    if group < 1:
        raise UserError(f"group is {group}.", "Give the number of inputs per grid, 1 or more.")
    if not weight.numel():
        raise UserError(f"the weight is empty, {tuple(weight.shape)}.", "Leave the layer out.")


def by_group(values: Float[Tensor, "rows width"], group: int) -> Float[Tensor, "rows groups _"]:
    """Cut every row into groups, in float32; the last one is filled up with zeros."""
    # One group wider than the row is the row.
    group = min(group, values.shape[1])
    # Every range is widened to hold 0.0, so zeros move none.
    values = values.float()
    if missing := -values.shape[1] % group:
        values = functional.pad(values, (0, missing))
    return values.reshape(len(values), -1, group)  # (rows, groups, group)


def fit(
    grouped: Float[Tensor, "*grids group"], bits: int, symmetric: bool
) -> tuple[Float[Tensor, "*grids"], Float[Tensor, "*grids"]]:
    """Fit one grid to the values along the last axis.

    With top = 2^bits - 1, a symmetric grid spans the largest magnitude on both sides of 0.0
    (full range: all 2^bits codes are used), an asymmetric one the range widened to hold 0.0:

        symmetric:   scale = max |w| / (top / 2)                 zero = 2^(bits - 1)
        asymmetric:  scale = (max(w, 0) - min(w, 0)) / top       zero = round(-min(w, 0) / scale)

    The scale is rounded up to what SCALE_DTYPE holds before anything is computed with it, so
    that codes are chosen on the grid that is stored and no value falls off its ends.

    Returns:
        Scale and zero point, both float32; zero points are whole numbers.

    Raises:
        UserError: A value is NaN or infinite.
    """
    low, high = grouped.amin(dim=-1), grouped.amax(dim=-1)
    return span(low, high, bits, symmetric)


def span(
    low: Float[Tensor, "*grids"], high: Float[Tensor, "*grids"], bits: int, symmetric: bool
) -> tuple[Float[Tensor, "*grids"], Float[Tensor, "*grids"]]:
    """The grid of `fit`, from the least and the greatest value it is to hold; differentiable."""
    top = 2**bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    # Divided before they are added, so that the widest float32 range does not overflow.
    scale = stored(high / top - low / top)
    return scale, torch.full_like(low, 2 ** (bits - 1)) if symmetric else rounded(-low / scale)


def fit_clipped(
    grouped: Float[Tensor, "*grids group"],
    importance: Float[Tensor, "*#grids group"],
    bits: int,
    symmetric: bool,
    clips: int,
) -> tuple[Float[Tensor, "*grids"], Float[Tensor, "*grids"]]:
    """The grid of `fit`, over the range that loses least.

    The ranges tried are 100%, 99%, 98% ... of the whole, `clips` of them; a narrower range
    has finer steps but clips its ends.  The loss is sum of importance (decode(encode(w)) - w)^2.
    """
    if clips == 1:
        return fit(grouped, bits, symmetric)
    kept = torch.tensor([1 - clip / 100 for clip in range(clips)]).view(
        -1, *[1] * grouped[..., 0].dim()
    )
    scales, zeros = span(
        kept * grouped.amin(dim=-1), kept * grouped.amax(dim=-1), bits, symmetric
    )  # (clips, *grids)
    losses = torch.empty_like(scales)
    step = max(1, _AT_ONCE // max(1, grouped.numel()))
    for first in range(0, clips, step):
        part = slice(first, first + step)
        wide = grouped.expand(len(scales[part]), *grouped.shape)
        losses[part] = _loss(wide, scales[part], zeros[part], importance, bits)
    # The first of equals; a loss that overflows is none to choose.
    chosen = losses.nan_to_num(nan=math.inf).argmin(dim=0, keepdim=True)
    return scales.gather(0, chosen)[0], zeros.gather(0, chosen)[0]


def encode(
    values: Float[Tensor, "*grids group"],
    scale: Float[Tensor, "*grids"],
    zero: Float[Tensor, "*grids"],
    bits: int,
) -> Float[Tensor, "*grids group"]:
    """Codes of the nearest grid points: clamp(round(w / scale) + zero, 0, 2^bits - 1)."""
    codes = values / scale[..., None]
    return codes.round_().add_(zero[..., None]).clamp_(0, 2**bits - 1)


def nearest(weight: Float[Tensor, "out in"], bits: int, group: int, symmetric: bool) -> Quantized:
    """Every weight as the nearest point of its group's grid.

    Raises:
        UserError: An option is out of range, or the weight holds NaN or infinity.
    """
    check_grid(weight, bits, group)
    grouped = by_group(weight, group)  # (out, groups, group)
    scale, zero = fit(grouped, bits, symmetric)
    codes = encode(grouped, scale, zero, bits).flatten(1)  # (out, in), filled up
    width = weight.shape[1]
    return pack(codes, scale, zero, width=width, bits=bits, group=group, symmetric=symmetric)


def pack(
    codes: Float[Tensor, "out padded"],
    scale: Float[Tensor, "out groups"],
    zero: Float[Tensor, "out groups"],
    *,
    width: int,
    bits: int,
    group: int,
    symmetric: bool,
    notes: tuple[str, ...] = (),
) -> Quantized:
    """Codes and grids as they are stored; codes past `width` only filled up the last group."""
    whole = codes[:, :width].int()
    return Quantized(
        # Torch converts float32 to int32 and that to uint8 faster than float32 to uint8.
        whole if bits > 8 else whole.to(torch.uint8),
        scale.to(SCALE_DTYPE),
        zero.int(),
        bits=bits,
        group=group,
        symmetric=symmetric,
        notes=notes,
    )


def storable(scale: Float[Tensor, "*grids"]) -> Float[Tensor, "*grids"]:
    """Round positive scales up to SCALE_DTYPE, which is the upper half of a float32.

    Raises:
        UserError: A scale is NaN or infinite, because a weight is.
    """
    if not scale.isfinite().all():
        raise UserError(
            "the weight holds NaN or infinity.", "Repair the checkpoint or leave the layer out."
        )
    # An all-zero group has no range; any positive step encodes it exactly.
    scale = scale.masked_fill(scale == 0, 1.0).clamp_(min=torch.finfo(SCALE_DTYPE).tiny)
    return scale.view(torch.int32).add_(0xFFFF).bitwise_and_(-0x10000).view(torch.float32)


def stored(scale: Float[Tensor, "*grids"]) -> Float[Tensor, "*grids"]:
    """Scales, as they are stored, with the gradient of the scales themselves."""
    return storable(scale.detach()) + (scale - scale.detach())


def _loss(
    values: Float[Tensor, "*grids group"],
    scale: Float[Tensor, "*grids"],
    zero: Float[Tensor, "*grids"],
    importance: Float[Tensor, "*#grids group"],
    bits: int,
) -> Float[Tensor, "*grids"]:
    error = encode(values, scale, zero, bits).sub_(zero[..., None]).mul_(scale[..., None])
    return error.sub_(values).square_().mul_(importance).sum(dim=-1)
