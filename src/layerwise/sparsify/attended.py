"""Tokens by the attention that they receive: what a ranking of the whole graph is compared with."""

from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import sparsifier
from layerwise.sparsify._keep import count, keep_highest


@sparsifier(
    Paper(
        "Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in "
        "Pre-Trained Transformers",
        2023,
        "2305.17328",
    )
)
def attended(
    attentions: Float[Tensor, "batch heads tokens tokens"], *, density: float, special: int = 1
) -> Bool[Tensor, "batch tokens"]:
    """Keep the tokens that receive most attention in one block.

        score_i = mean over heads and queries j of A_ji

    This is `zero_tprune` with one step through the graph and no look at which tokens are alike, a
    baseline.

    Args:
        attentions: Attention of each head, its rows by query.
        density: Fraction of the tokens to keep, above 0.
        special: So many tokens at the beginning always stay, as a class token must.

    Returns:
        True where a token is kept.

    Raises:
        UserError: The density is outside (0, 1].
    """
    received = attentions.float().mean(dim=(1, 2))  # (batch, tokens)
    received[:, :special] = float("inf")
    return keep_highest(received, count(density, attentions.shape[3]))
