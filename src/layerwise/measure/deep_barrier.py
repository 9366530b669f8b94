"""Cumulative linear mode connectivity: what lies between the last blocks and another model's."""

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import measure
from layerwise.measure._path import over_the_ends


@measure(Paper("Layer-wise Linear Mode Connectivity", 2024, "2307.06966"), unit="block")
def deep_barrier(deep_path: Float[Tensor, " points"], ends: Float[Tensor, " two"]) -> float:
    """Score a block by how much the loss rises when it and all after it are averaged.

    The paper's cumulative barrier, grown from the deep end: with S the block and all blocks after
    it, and the rest of the network A as it is,

        barrier = max over a in (0, 1) of  L(a) - ((1 - a) L(A) + a L(B))

    Held against `growing_barrier`, which begins at the shallow end, it tells in which part of the
    depth the networks part: the averaged blocks read what A's own first blocks make.  The
    embeddings and what follows the last block are A's throughout, so the first block's value is not
    quite that of the whole networks' average.

    For B blocks it takes B^2 passes of the text through a block for each point of the way.

    Args:
        deep_path: Mean loss on the way, evenly spaced, from A to B's last blocks.
        ends: Mean loss of A and of B.

    Returns:
        Barrier in nats per prediction; higher is more important.
    """
    return over_the_ends(deep_path, ends)
