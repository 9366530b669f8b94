"""Filter sparsity: how many kernels of a convolution are next to nothing."""

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import measure
from layerwise.measure._filters import filters_of, sparse_of


@measure(
    Paper(
        "CNN Filter DB: An Empirical Investigation of Trained Convolutional Filters",
        2022,
        "2203.15331",
    )
)
def filter_sparsity(
    weight: Float[Tensor, "out in"],
    *,
    entries: int = 9,
    share: float = 0.01,
    quantile: float = 1.0,
) -> float:
    """Score a convolution by the share of its filters that are next to nothing.

    A filter is sparse if all its entries are:

        t        = share * max |w|
        sparsity = #{filters with every |w| < t} / #filters

    Unlike the paper, the score is -sparsity, so that higher is more important.  One huge weight
    makes all others sparse; a quantile below 1 takes the place of the largest then.  A layer of
    zeros is sparse throughout, and one whose width `entries` does not divide has no such filters:
    it scores 0.

    Args:
        weight: The layer, the kernel's entries of each input channel side by side.
        entries: Height times width of the kernel.
        share: What counts as next to nothing, as a share of the largest weight.
        quantile: Which weight is the largest that counts, by size: 1 is the largest there is.

    Returns:
        Share of filters, negated, from -1 to 0 (none is sparse); higher is more important.

    Raises:
        UserError: `entries` is below 1, or `share` or `quantile` outside (0, 1].
    """
    sparse = sparse_of(filters_of(weight, entries), share, quantile)
    return -float(sparse.double().mean()) if len(sparse) else 0.0
