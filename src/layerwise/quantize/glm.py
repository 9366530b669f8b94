"""GLM-130B's recipe: 4 or 8 bits and one scale for each row, by its largest weight."""

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.errors import UserError
from layerwise.core.results import Quantized
from layerwise.core.verbs import quantizer
from layerwise.quantize._grid import by_group, check_grid, pack, storable

_WIDTHS = (4, 8)


@quantizer(
    Paper("GLM-130B: An Open Bilingual Pre-trained Model", 2022, "2210.02414"),
    rows="independent",
    widths=_WIDTHS,
)
def glm(
    weight: Float[Tensor, "out in"], *, bits: int = 4, group: int = 0, symmetric: bool = True
) -> Quantized:
    """Round each weight to the nearest multiple of its row's scale, with as many below 0 as above.

    Inputs of the model that the recipe is from are left alone, since almost a third of their
    features have outliers; its weights lie close together, so that one scale for a row is enough:

        top   = 2^(bits - 1) - 1
        scale = max|w| / top
        code  = clamp(round(w / scale), -top, top)

    The code -top - 1 is never used, so that 4 bits go from -7 to 7.  Unlike the authors' code,
    which keeps the scale as the nearest float16 and clamps nothing, the scale is rounded up to
    16 bits of float32's range before codes are chosen: small rows do not vanish, and no code is
    beyond the top.  The training recipe of the paper is no part of this.

    Args:
        weight: Layer to quantize.
        bits: Width of a code, 4 or 8.
        group: Inputs that share a scale; 0 is the whole row.
        symmetric: Store no zero points.  Codes lie alike on both sides of 0.0 either way.

    Raises:
        UserError: An option is out of range, or the weight holds NaN or infinity.
    """
    if bits not in _WIDTHS:
        raise UserError(f"bits is {bits}.", "Give 4 or 8.")
    width = weight.shape[1]
    group = group or width
    check_grid(weight, bits, group)
    grouped = by_group(weight, group)  # (out, groups, group)
    top = 2 ** (bits - 1) - 1
    scale = storable(grouped.abs().amax(dim=-1) / top)
    zero = torch.full_like(scale, top + 1)
    codes = (grouped / scale[..., None]).round_().clamp_(-top, top) + zero[..., None]
    return pack(
        codes.flatten(1), scale, zero, width=width, bits=bits, group=group, symmetric=symmetric
    )
