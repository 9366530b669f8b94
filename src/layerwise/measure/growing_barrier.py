"""Cumulative linear mode connectivity: what lies between the first blocks and another model's."""

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import measure
from layerwise.measure._path import over_the_ends


@measure(Paper("Layer-wise Linear Mode Connectivity", 2024, "2307.06966"), unit="block")
def growing_barrier(growing_path: Float[Tensor, " points"], ends: Float[Tensor, " two"]) -> float:
    """Score a block by how much the loss rises when it and all before it are averaged.

    The paper's cumulative barrier, grown from the shallow end: with S the block and all blocks
    before it, and the rest of the network A as it is,

        barrier = max over a in (0, 1) of  L(a) - ((1 - a) L(A) + a L(B))

    A single layer hardly ever has a barrier, groups do: where this rises steeply with depth is
    where the networks part.  The embeddings and what follows the last block are A's throughout,
    so the last block's value is not quite that of the whole networks' average.

    Args:
        growing_path: Mean loss on the way, evenly spaced from A to B's first blocks.
        ends: Mean loss of A and of B.

    Returns:
        Barrier in nats per prediction; higher is more important.
    """
    return over_the_ends(growing_path, ends)
