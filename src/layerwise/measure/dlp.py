"""Dynamic layerwise pruning: how large the typical Wanda score of a block is."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.verbs import measure

_SOURCE = "README: LLaMA-7B at 70%, Wanda, perplexity 20.46 against OWL's 24.46 (dense 5.68)"
_OPTIONS = {
    "allocate": "stretch",
    "pruner": "wanda",
    "options": {"allocate/stretch": {"spread": 0.15}},
}


@measure(
    Paper("DLP: Dynamic Layerwise Pruning in Large Language Models", 2025, "2505.23807"),
    unit="block",
    claims=(
        Claim("owl", "reference-6m/measure", {**_OPTIONS, "density": 0.4}, 0.05, _SOURCE),
        Claim("owl", "stories-char-940k/measure", {**_OPTIONS, "density": 0.5}, 0.05, _SOURCE),
    ),
)
def dlp(weights: Sequence[Float[Tensor, "_ _"]], norms: Sequence[Float[Tensor, " _"]]) -> float:
    """Score a block by how little its median weight does: the less, the more important it is.

    What a weight does is its size times the norm of its input, as in Wanda, over all linear layers
    of the block together:

        A_ij = |W_ij| ||X_j||_2 ,   m_b = median(A)

    The paper's importance, v_b = 1 - m_b / sum_c m_c, is a straight line in -m_b, which is what is
    returned: `allocate/stretch`, with a spread of 0.15, makes the same densities of both.  That
    much activity means little importance is meant so: activations grow with depth, and later
    blocks can lose more.

    Unlike the authors' code, whose main path takes the mean, it is the paper's median.  Of an even
    number it is the lower of the two in the middle.  It is found exactly without sorting or
    pooling: of float32 numbers that are not negative, the order is that of their bits, whose upper
    half is counted first and then the lower half among those that share the median's upper.

    Args:
        weights: The block's linear layers, one tensor each; read twice, one at a time.
        norms: Of each layer's inputs, the root of the mean of x^2 over tokens.

    Returns:
        The median, negated; higher is more important.
    """
    rank = (sum(weight.numel() for weight in weights) - 1) // 2
    upper, below = _holding(rank, (bits >> 16 for bits in _bits(weights, norms)))
    rest = (bits[bits >> 16 == upper] & 0xFFFF for bits in _bits(weights, norms))
    lower, _ = _holding(rank - below, rest)
    return -float(torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32))


def _bits(
    weights: Sequence[Float[Tensor, "_ _"]], norms: Sequence[Float[Tensor, " _"]]
) -> Iterator[Int64[Tensor, " entries"]]:
    """What each weight does, layer by layer, as the bits of a float32."""
    for weight, norm in zip(weights, norms, strict=True):
        done = (weight.float().abs() * norm.float()).flatten()  # (out * in,)
        yield done.view(torch.int32).long()


def _holding(rank: int, digits: Iterable[Int64[Tensor, " _"]]) -> tuple[int, int]:
    """The digit that the number of a rank has, and how many numbers have a lower one."""
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for part in digits:
        counts += part.bincount(minlength=1 << 16)
    sums = counts.cumsum(dim=0)
    digit = int(torch.searchsorted(sums, rank, right=True))
    return digit, int(sums[digit] - counts[digit])
