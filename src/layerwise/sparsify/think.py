"""ThinK: channels of cached keys that recent queries hardly ask for."""

from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import sparsifier
from layerwise.sparsify._keep import count, keep_highest

_SOURCE = "abstract: over 20% less key-value memory at comparable or better accuracy"


@sparsifier(
    Paper("ThinK: Thinner Key Cache by Query-Driven Pruning", 2024, "2407.21018"),
    claims=(
        Claim("key_norm", "reference-6m/sparsify", {"density": 0.6}, 0.05, _SOURCE),
        Claim("key_norm", "reference-6m/sparsify", {"density": 0.4}, 0.05, _SOURCE),
        Claim("key_norm", "reference-6m/sparsify", {"density": 0.2}, 0.05, _SOURCE),
        Claim("key_norm", "stories-char-940k/sparsify", {"density": 0.6}, 0.05, _SOURCE),
        Claim("key_norm", "stories-char-940k/sparsify", {"density": 0.2}, 0.05, _SOURCE),
    ),
)
def think(
    queries: Float[Tensor, "batch heads asking size"],
    keys: Float[Tensor, "batch keyheads tokens size"],
    *,
    density: float,
    window: int = 32,
) -> Bool[Tensor, "batch keyheads size"]:
    """Keep the channels of each head in which recent queries and the cached keys are largest.

    Attention compares them by Q K^T, a sum over channels of Q_:,d K_:,d^T, each term of which has
    the Frobenius norm ||Q_:,d|| ||K_:,d||:

        score_d = mean over the last `window` queries of Q_t,d^2
                  * mean over tokens of K_t,d^2

    Terms are not orthogonal, so this is the diagonal of the true objective, as in the paper.

    Unlike the authors' code, which repeats the keys for each head of queries and so keeps a mask
    for each, heads of queries that share keys share a mask: the energies of all of them are
    averaged, and the cache stays as small as grouped queries made it.

    Args:
        queries: What was asked, after rotary embeddings; the last are the latest.
        keys: What is cached, after rotary embeddings.
        density: Fraction of a head's channels to keep, above 0.
        window: Latest queries that are looked at.

    Returns:
        True where a channel is kept.

    Raises:
        UserError: The density is outside (0, 1], the window holds no query, or heads of queries
            do not divide among those of keys.
    """
    kept = count(density, keys.shape[3])
    if window < 1 or queries.shape[1] % keys.shape[1]:
        raise UserError(
            f"a window of {window} queries of {queries.shape[1]} heads over keys of "
            f"{keys.shape[1]} heads shows nothing.",
            "Give a window of one query at least, and heads that share keys evenly.",
        )
    asked = queries[:, :, -window:].float().square().mean(dim=2)  # (batch, heads, size)
    shared = asked.unflatten(1, (keys.shape[1], -1)).mean(dim=2)  # (batch, keyheads, size)
    return keep_highest(shared * keys.float().square().mean(dim=2), kept)
