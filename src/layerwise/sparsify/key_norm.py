"""Channels of keys by the size of the keys alone: what a query-driven choice is compared with."""

from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import sparsifier
from layerwise.sparsify._keep import count, keep_highest


@sparsifier(Paper("ThinK: Thinner Key Cache by Query-Driven Pruning", 2024, "2407.21018"))
def key_norm(
    keys: Float[Tensor, "batch keyheads tokens size"], *, density: float
) -> Bool[Tensor, "batch keyheads size"]:
    """Keep the channels of each head in which the cached keys are largest.

        score_d = mean over tokens of K_t,d^2

    This is `think` without its queries, a baseline of that paper.

    Args:
        keys: What is cached, after rotary embeddings.
        density: Fraction of a head's channels to keep, above 0.

    Returns:
        True where a channel is kept.

    Raises:
        UserError: The density is outside (0, 1].
    """
    energy = keys.float().square().mean(dim=2)  # (batch, keyheads, size)
    return keep_highest(energy, count(density, keys.shape[3]))
