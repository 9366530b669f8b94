"""Layer-wise linear mode connectivity: what lies between a layer and another model's."""

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import measure
from layerwise.measure._path import over_the_ends


@measure(Paper("Layer-wise Linear Mode Connectivity", 2024, "2307.06966"))
def barrier(path: Float[Tensor, " points"], ends: Float[Tensor, " two"]) -> float:
    """Score a layer by how much the loss rises when it alone is averaged with another model's.

    With the networks A and B, and A with its layer S at (1 - a) A_S + a B_S:

        barrier = max over a in (0, 1) of  L(a) - ((1 - a) L(A) + a L(B))

    Two trained networks are far apart when all layers are averaged, and hardly ever when one is.
    At the three points 0, 1/2, 1 it is the official code's L(1/2) - (L(A) + L(B)) / 2.  The loss at
    a = 1, with the layer exchanged, is left out: that is no average.

    The line is that between both networks, not between A and A with B's layer, so a layer that
    does nothing has a barrier of (L(A) - L(B)) / 2, the same for all.  Below 0 stays below 0:
    networks that are not at their minimum gain by averaging.  Biases go with their layer; norms
    stay.

    Args:
        path: Mean loss on the way, evenly spaced from A to B's layer.
        ends: Mean loss of A and of B.

    Returns:
        Barrier in nats per prediction; higher is more important.
    """
    return over_the_ends(path, ends)
