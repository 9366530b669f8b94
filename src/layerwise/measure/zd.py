"""Z-score distribution: how many of a block's weights are unusually large."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import measure


@measure(
    Paper(
        "Layer-Wise Quantization: A Pragmatic and Effective Method for Quantizing LLMs Beyond "
        "Integer Bit-Levels",
        2024,
        "2406.17415",
    ),
    unit="block",
)
def zd(weights: Sequence[Float[Tensor, "..."]]) -> float:
    """Score a block by the share of its weights that stand out, from the weights alone.

    All weights of the block's linear layers are pooled:

        z_i = (w_i - mean) / std ,   ZD = #{i : z_i > 1} / #weights

    Only large positive weights count, as in the paper, and a block with fewer of them is more
    important.  Unlike the paper, the score is -ZD, so that higher is more important.

    The paper does not say what to do without any spread: then no weight stands out.

    Args:
        weights: The block's linear layers, one tensor each; read three times, one at a time.

    Returns:
        Share of the weights, negated, from -1 to 0 (none stands out); higher is more important.
    """
    size = sum(weight.numel() for weight in weights)
    mean = sum(float(weight.sum(dtype=torch.float64)) for weight in weights) / size
    variance = sum(float((weight.double() - mean).square().sum()) for weight in weights) / size
    # Equal weights differ from their mean by rounding alone, which is no spread.
    deviation = max(variance**0.5, 1e-12 * abs(mean))
    large = sum(int((weight.double() - mean > deviation).sum()) for weight in weights)
    return -large / size
