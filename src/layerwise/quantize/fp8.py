"""FP8: codes that are 8-bit floats, fine near 0.0 and coarse far from it."""

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.errors import UserError
from layerwise.core.results import FLOAT8_DTYPE, SCALE_DTYPE, Quantized, float8_points
from layerwise.core.verbs import quantizer
from layerwise.quantize._grid import by_group, check_grid, storable

_LARGEST = torch.finfo(FLOAT8_DTYPE).max  # 448


@quantizer(
    Paper("FP8 Formats for Deep Learning", 2022, "2209.05433"),
    exempt={
        "each_bit_quarters_the_loss": "4 of the 8 bits hold an exponent: 3 of precision are left",
    },
    rows="independent",
    codes="float8",
    widths=(8,),
)
def fp8(
    weight: Float[Tensor, "out in"], *, bits: int = 8, group: int = 128, symmetric: bool = True
) -> Quantized:
    """Round each weight to the nearest 8-bit float, E4M3, of its group's scale.

    A code is a sign, 4 bits of exponent and 3 of mantissa, with a bias of 7 (table 1):

        value = (-1)^s 2^(e - 7) (1 + m / 8)    for e > 0
        value = (-1)^s 2^-6 (m / 8)             for e = 0

    from 2^-9 to 448; s.1111.111 is NaN, and there is no infinity.  Every group is scaled so that
    its largest weight becomes the largest code, which is what section 3.1 says of weights:

        scale = max|w| / 448,    code = E4M3(w / scale)

    with ties to even.  Codes are the bit patterns, as torch.float8_e4m3fn has them.  Unlike the
    paper, which scales a whole tensor, each group has a scale, rounded up to 16 bits before codes
    are chosen, so that no weight falls off the end.

    Args:
        weight: Layer to quantize.
        bits: 8; there is no other.
        group: Inputs that share a scale; the last group of a row may be shorter.
        symmetric: Store no zero points.  Floats lie alike on both sides of 0.0 either way.

    Raises:
        UserError: An option is out of range, or the weight holds NaN or infinity.
    """
    if bits != 8:
        raise UserError(f"bits is {bits}.", "Give 8: E4M3 codes have no other width.")
    check_grid(weight, bits, group)
    grouped = by_group(weight, group)  # (out, groups, group)
    scale = storable(grouped.abs().amax(dim=-1) / _LARGEST)
    scaled = (grouped / scale[..., None]).clamp_(-_LARGEST, _LARGEST)
    codes = scaled.to(FLOAT8_DTYPE).flatten(1)[:, : weight.shape[1]]  # (out, in)
    return Quantized(
        codes.contiguous().view(torch.uint8),
        scale.to(SCALE_DTYPE),
        torch.zeros(scale.shape, dtype=torch.int32),
        bits=bits,
        group=group,
        symmetric=symmetric,
        points=float8_points(),
    )
