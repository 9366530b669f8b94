"""Round to nearest: the baseline every other quantizer is measured against."""

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.results import Quantized
from layerwise.core.verbs import quantizer
from layerwise.quantize._grid import nearest


@quantizer(
    Paper(
        "Quantization and Training of Neural Networks for Efficient Inference", 2018, "1712.05877"
    ),
    rows="independent",
)
def rtn(
    weight: Float[Tensor, "out in"], *, bits: int, group: int = 128, symmetric: bool = False
) -> Quantized:
    """Round each weight to the nearest of 2^bits evenly spaced points.

    Every `group` consecutive inputs of an output row share one grid.  It spans the group's
    range, widened to hold 0.0 so that a pruned weight stays exactly zero:

        scale = (max(w, 0) - min(w, 0)) / (2^bits - 1)
        zero  = round(-min(w, 0) / scale)
        code  = clamp(round(w / scale) + zero, 0, 2^bits - 1)                    (eq. 1, 12)

    A symmetric grid spans max |w| on both sides instead, and its zero is always 2^(bits - 1).
    Unlike the paper, the scale is rounded up to 16 bits before codes are chosen.

    Args:
        weight: Layer to quantize.
        bits: Width of a code, from 1 to 16.
        group: Inputs that share a grid; the last group of a row may be shorter.
        symmetric: Centre every grid on 0.0, so that no zero points are stored.

    Raises:
        UserError: An option is out of range, or the weight holds NaN or infinity.
    """
    return nearest(weight, bits, group, symmetric)
