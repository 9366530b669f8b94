"""Magnitude pruning: the baseline every other pruner is measured against."""

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.results import Pruned
from layerwise.core.verbs import pruner
from layerwise.prune._mask import check_density, keep_highest


@pruner(
    Paper("Learning both Weights and Connections for Efficient Neural Networks", 2015, "1506.02626")
)
def magnitude(weight: Float[Tensor, "out in"], *, density: float, among: int = 0) -> Pruned:
    """Keep the largest weights of a layer.

    The score of a weight is its absolute value, and the layer keeps exactly

        round(density * out * in)

    weights with the highest scores.  Of equal weights the earlier one stays, so that a result
    in a coarse dtype can be reproduced.  Weights that are already zero count as removed.

    Unlike the reference code of later comparisons, which removes every weight at or below the
    k-th smallest, the count is exact and a density of 1 removes nothing.

    Args:
        weight: Layer to prune.
        density: Fraction of weights to keep, in (0, 1].
        among: Compare only within windows of this many consecutive inputs of a row: density
            0.5 among 4 is the 2:4 pattern.  0 compares the whole layer.

    Raises:
        UserError: The density cannot be met.
    """
    check_density(density, weight.shape[1], among)
    scores = weight.float().abs().reshape(-1, among or weight.numel())  # (sets, size)
    kept = keep_highest(scores, round(density * scores.shape[1])).reshape(weight.shape)
    return Pruned(kept, weight.float().where(kept, 0.0))
