"""Cumulative linear mode connectivity: what lies between blocks drawn at random and another's."""

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import measure
from layerwise.measure._path import over_the_ends


@measure(Paper("Layer-wise Linear Mode Connectivity", 2024, "2307.06966"), unit="block")
def random_barrier(random_path: Float[Tensor, " points"], ends: Float[Tensor, " two"]) -> float:
    """Score a block by how much the loss rises when it and all drawn before it are averaged.

    The paper's cumulative barrier, grown in a random order, the same for all pairs of models of one
    depth: with S the block and all that were drawn before it, and the rest of A as it is,

        barrier = max over a in (0, 1) of  L(a) - ((1 - a) L(A) + a L(B))

    It is what as many blocks cost wherever they are: where `growing_barrier` or `deep_barrier`, at
    as many blocks, is above it, those blocks do not go together.  The embeddings and what follows
    the last block are A's throughout.

    For B blocks it takes B^2 passes of the text through a block for each point of the way.

    Args:
        random_path: Mean loss on the way, evenly spaced, from A to B's drawn blocks.
        ends: Mean loss of A and of B.

    Returns:
        Barrier in nats per prediction; higher is more important.
    """
    return over_the_ends(random_path, ends)
