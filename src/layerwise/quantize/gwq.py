"""GWQ: keep the few weights that the loss depends on most, and round the rest."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.results import Outliers, Quantized, outlier_room
from layerwise.core.statistics import check_statistics
from layerwise.core.verbs import quantizer
from layerwise.quantize._grid import check_grid, nearest

# Beyond that, weights that are kept would be further off than those that are rounded.
_MOST_BITS = 8

_SOURCE = "abstract: perplexity below rounding and calibrated methods at 3 and 4 bits"


@quantizer(
    Paper("GWQ: Gradient-Aware Weight Quantization for Large Language Models", 2024, "2411.00850"),
    claims=(
        Claim("rtn", "bytes-wikitext/quantize", {"bits": 3, "group": 64}, 0.05, _SOURCE),
        Claim("rtn", "bytes-wikitext-outliers/quantize", {"bits": 3, "group": 64}, 0.05, _SOURCE),
        Claim("rtn", "reference-6m/quantize", {"bits": 3, "group": 64}, 0.05, _SOURCE),
        Claim("gptq", "bytes-wikitext/quantize", {"bits": 3, "group": 64}, 0.0, _SOURCE),
    ),
    codes="outliers",
    widths=range(1, _MOST_BITS + 1),
)
def gwq(
    weight: Float[Tensor, "out in"],
    grad: Float[Tensor, "out in"],
    *,
    bits: int,
    group: int = 128,
    symmetric: bool = False,
    outliers: float = 0.01,
) -> Quantized:
    """Keep the weights with the largest gradient of the loss in 16 bits, and round the others.

    With the gradient of the model as it is, before anything is rounded, the k = rho |W| entries

        kept:  the k largest |dL / dw|

    stay as they are.  They leave the ranges of the others, which are rounded to nearest:

        scale = (max(x, 0) - min(x, 0)) / (2^bits - 1),    x = w, but 0 where w is kept
        code  = clamp(round(x / scale) + zero, 0, 2^bits - 1)

    The paper gives the rule, a share of 1% and a single sample of text; it does not say how large
    a group is, nor whether the share is one of each layer or of the model: here it is one of each
    layer.  Of equal gradients the first are kept, row by row.  The gradient is the mean over the
    predictions of a few windows, for that of one alone is noisy.

    Args:
        weight: Layer to quantize.
        grad: Mean gradient of the loss with respect to it.
        bits: Width of a code, from 1 to 8.
        group: Inputs that share a grid; the last group of a row may be shorter.
        symmetric: Centre every grid on 0.0, so that no zero points are stored.
        outliers: Fraction rho of the weights that is kept, from 0, which is rounding to nearest,
            to 1.

    Returns:
        Codes and outliers.

    Raises:
        UserError: An option is out of range, or a value is NaN or infinite.
    """
    if bits > _MOST_BITS:
        raise UserError(f"bits is {bits}.", f"Give bits from 1 to {_MOST_BITS}.")
    check_grid(weight, bits, group)
    if not 0 <= outliers <= 1:
        raise UserError(f"outliers is {outliers}.", "Give a fraction from 0 to 1.")
    values = weight.float()
    if not values.isfinite().all():
        raise UserError(
            "the weight holds NaN or infinity.", "Repair the checkpoint or leave the layer out."
        )
    check_statistics(grad)
    kept = _largest(grad.float().abs(), outlier_room(weight.numel(), outliers))
    made = nearest(values.masked_fill(kept, 0.0), bits, group, symmetric)
    return replace(made, outliers=Outliers.of(kept, values))


def _largest(sizes: Float[Tensor, "out in"], count: int) -> Bool[Tensor, "out in"]:
    """True at the largest entries, so many of them; of equal ones, at the first."""
    flat = sizes.flatten()
    if not count:
        return torch.zeros_like(sizes, dtype=torch.bool)
    least = flat.topk(count).values[-1]
    chosen = flat > least
    equal = (flat == least).nonzero()[: count - int(chosen.sum()), 0]
    return chosen.index_fill(0, equal, True).reshape(sizes.shape)
