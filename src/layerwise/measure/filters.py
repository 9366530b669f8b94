"""Filters: how many patterns the kernels of a convolution are made of."""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import measure
from layerwise.measure._filters import filters_of, sparse_of

# The lower edge of H for layers of noise with 3 x 3 filters, over log2 of their number.
_HEIGHT, _SLOPE, _MIDDLE, _BASE = 1.2618047, 0.88767525, 2.30436435, -0.31050834
_FEWEST = 16


@measure(
    Paper(
        "CNN Filter DB: An Empirical Investigation of Trained Convolutional Filters",
        2022,
        "2203.15331",
    )
)
def filters(
    weight: Float[Tensor, "out in"],
    *,
    entries: int = 9,
    clean: bool = False,
    relative: bool = False,
) -> float:
    """Score a convolution by the entropy of its filters' variance over their principal patterns.

    A layer of n filters, each a k x k kernel, that has learned nothing is noise, the same in all
    directions; one that degenerated repeats a few patterns.  With the singular values s of the
    (n, k^2) matrix of filters less their mean,

        v_i = s_i^2 / (n - 1) ,   p_i = v_i / sum_j v_j ,   H = - sum_i p_i log10 p_i

    From 0, one pattern, to log10 k^2 (0.954 for 3 x 3).  Noise reaches less where it has few
    filters: for 3 x 3 its lower edge is

        T(n) = 1.2618 / (1 + exp(-0.88768 (log2 n - 2.3044))) - 0.31051

    so H / T(n) is 1 or more for a layer that cannot be told from noise, about 0.9 for a healthy
    one, near 0 for one that repeats itself.

    The paper does not say that a layer of higher entropy is more important: here it is, as fewer
    of its filters can stand in for others.  The weights are looked at as they are, without the
    batch norm that follows, as in the paper.  A layer without any variance has 0, and so has one
    whose width `entries` does not divide, such as most linear layers: it has no such filters.
    Only the width can tell: a linear layer of 576 inputs is taken for 64 channels.

    The paper's other figures are the share of filters near zero, filter_sparsity, the
    orthogonality of outputs, filter_orthogonality, and the shift between two populations of
    filters, filter_shift.

    Args:
        weight: The layer, the kernel's entries of each input channel side by side.
        entries: Height times width of the kernel.
        clean: Leave out filters all of whose entries are below 1% of the layer's largest.
        relative: Divide by T(n).

    Returns:
        Entropy in decimal digits, or as a share of that of noise; higher is more important.

    Raises:
        UserError: `entries` is below 1, or the entropy relative to T(n) is asked for of fewer than
            16 filters, or of those that are not 3 x 3.
    """
    seen = filters_of(weight, entries)
    if clean:
        seen = seen[~sparse_of(seen, 0.01)]
    entropy = _entropy(seen)
    if not relative or not entropy:
        return entropy
    if entries != 9 or len(seen) < _FEWEST:
        raise UserError(
            f"noise of {len(seen)} filters with {entries} entries is not known.",
            f"Leave relative out, or give {_FEWEST} filters or more of 3 x 3.",
        )
    steepness = math.exp(-_SLOPE * (math.log2(len(seen)) - _MIDDLE))
    return entropy / (_HEIGHT / (1 + steepness) + _BASE)


def _entropy(seen: Float64[Tensor, "filters entries"]) -> float:
    """Of the variance over principal patterns; 0 where there is none but that of rounding."""
    if len(seen) < 2 or not bool(seen.any()):
        return 0.0
    scaled = seen / seen.abs().max()
    centred = scaled - scaled.mean(dim=0)
    variance = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0)  # (entries,)
    if float(variance.sum()) < 1e-24 * scaled.numel():
        return 0.0
    shares = variance / variance.sum()
    return max(0.0, -float(torch.xlogy(shares, shares).sum()) / math.log(10))
