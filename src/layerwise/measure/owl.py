"""Outlier weighed layerwise sparsity: how many of a block's Wanda scores stand out."""

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import measure


@measure(
    Paper(
        "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High "
        "Sparsity",
        2023,
        "2310.05175",
    ),
    unit="block",
)
def owl(
    weights: Sequence[Float[Tensor, "_ _"]],
    norms: Sequence[Float[Tensor, " _"]],
    *,
    outlier: float = 5.0,
) -> float:
    """Score a block by the share of its weights that do far more than the average one.

    What a weight does is its size times the norm of its input, as in Wanda, over all linear layers
    of the block together:

        A_ij = |W_ij| ||X_j||_2 ,   LOD = #{A > M mean(A)} / #weights

    A block with more outliers is to keep more of its weights: `allocate/stretch` turns the scores
    into densities.

    Unlike the paper, this is a share, not a percentage, and norms are means over tokens: neither
    changes what is stretched.  A block that does nothing has no outliers.

    Args:
        weights: The block's linear layers, one tensor each; read twice, one at a time.
        norms: Of each layer's inputs, the root of the mean of x^2 over tokens.
        outlier: M, how many times the mean stands out; the paper uses 5 or 7.

    Returns:
        Share of the weights, from 0 to 1 / M; higher is more important.

    Raises:
        UserError: `outlier` is not above 0.
    """
    if not outlier > 0:
        raise UserError(f"outlier {outlier} is not above 0.", "Give a factor, such as 5.")
    layers = list(zip(weights, norms, strict=True))
    size = sum(weight.numel() for weight in weights)
    mean = math.fsum(float((w.double().abs() * n.double()).sum()) for w, n in layers) / size
    standing = sum(int((w.double().abs() * n.double() > outlier * mean).sum()) for w, n in layers)
    return standing / size
