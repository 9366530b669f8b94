"""Coarse-to-fine pruning's score: how much the loss of the model reacts to a layer."""

import math

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.statistics import check_statistics
from layerwise.core.verbs import measure


@measure(
    Paper(
        "ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models",
        2023,
        "2310.02998",
    )
)
def ecoflap(grad: Float[Tensor, "out in"]) -> float:
    """Score a layer by what a small random change of its weights does to the model's loss.

    The paper estimates it by two forward passes for each draw of a noise z,

        S = mean of |(L(W + eps z) - L(W - eps z)) / (2 eps)| ,   z ~ N(0, 1)

    Where eps is small the quotient is <grad L, z>, whose size is on average

        S = sqrt(2 / pi) ||grad L||_2

    Unlike the paper, the gradient itself is read and nothing is drawn: this is what its draws
    estimate, without their noise, for one more pass back through the model.  It is the gradient of
    the calibration text as a whole, where the paper adds up the sizes of its batches.

    Args:
        grad: Mean gradient of the loss with respect to the layer's weight.

    Returns:
        Nats per unit of noise, from 0; higher is more important.

    Raises:
        UserError: The gradient is NaN or infinite somewhere.
    """
    check_statistics(grad)
    return math.sqrt(2 / math.pi) * float(grad.double().norm())
