"""Zero-TPrune: tokens that important tokens do not attend to, or that another one repeats."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import sparsifier
from layerwise.sparsify._keep import count, keep_highest

# A head speaks where the variance of its scores, in units of their mean, is between these.
_LEAST, _MOST = 0.01, 0.7
_SOURCE = "abstract: up to 49% less accuracy lost than by other methods without training"
_HALF = {"density": 0.5, "after": [1]}
_TINY = torch.finfo(torch.float32).tiny


@sparsifier(
    Paper(
        "Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in "
        "Pre-Trained Transformers",
        2023,
        "2305.17328",
    ),
    claims=(
        Claim("random", "mnist-vit/sparsify", _HALF, 0.2, _SOURCE),
        Claim("attended", "mnist-vit/sparsify", _HALF, 0.0, _SOURCE),
        Claim("attended", "mnist-vit/sparsify", {"density": 0.7, "after": [1, 3]}, 0.0, _SOURCE),
    ),
    exempt={
        "a_higher_density_keeps_what_a_lower_one_does": "which tokens repeat others is found "
        "among the less important half, and what is left of it is ranked anew"
    },
)
def zero_tprune(
    attentions: Float[Tensor, "batch heads tokens tokens"],
    keys: Float[Tensor, "batch keyheads tokens size"],
    *,
    density: float,
    alike: float = 0.33,
    steps: int = 10,
    special: int = 1,
) -> Bool[Tensor, "batch tokens"]:
    """Keep the tokens that matter in the graph of attention, without those that others repeat.

    A token is important if important tokens attend to it: with A the attention of a head,

        s_0 = 1 / N ,   s_{t+1} = A^T s_t

    Heads are joined by the root of the mean of s^2, over those whose scores, in units of their
    mean, have a variance from 0.01 to 0.7; over all if there is none.  Then, in this order:

        I'  rank all tokens so
        S   of the less important half, drop those most like some token of the other half,
            by the cosine of their keys, all heads together
        I   with A restricted to what is left and its rows made to sum to 1 again, take as many
            steps more and drop the least important

    The paper does not say in what unit its bounds of the variance are; nor in general how much
    either stage drops, which it searches for model by model: `alike` is the part of S.

    Args:
        attentions: Attention of each head, its rows by query.
        keys: What the queries were compared with.
        density: Fraction of the tokens to keep, above 0.
        alike: Part of the dropped tokens that is dropped for being like others.
        steps: Steps through the graph in each ranking; the paper takes 30 to 50 in early blocks,
            5 to 10 in the middle, 1 in late ones.
        special: So many tokens at the beginning always stay, as a class token must.

    Returns:
        True where a token is kept.

    Raises:
        UserError: The density is outside (0, 1], `alike` outside [0, 1], or no step is taken.
    """
    tokens = attentions.shape[3]
    kept = count(density, tokens)
    if not 0 <= alike <= 1 or steps < 1:
        raise UserError(
            f"alike {alike} in {steps} steps ranks nothing.",
            "Give a part from 0 to 1, and one step at least.",
        )
    graph = attentions.float()
    scores = torch.full(graph.shape[:3], 1 / tokens, device=graph.device)
    scores = _ranked(graph, scores, steps)
    importance = _joined(scores, special)  # (batch, tokens)
    left = torch.ones_like(importance, dtype=torch.bool)
    half = max(0, tokens - special) // 2
    repeated = min(round(alike * (tokens - kept)), half)
    if repeated:
        left = ~_most_alike(importance, keys.float(), half, repeated, special)
        graph = graph * left[:, None, None, :] * left[:, None, :, None]
        # A row that attended only to what was dropped attends to nothing.
        graph = graph / graph.sum(dim=-1, keepdim=True).clamp(min=_TINY)
    scores = _ranked(graph, scores * left[:, None], steps)
    return keep_highest(_joined(scores, special).where(left, -torch.inf), kept)


def _ranked(graph: Tensor, scores: Tensor, steps: int) -> Float[Tensor, "batch heads tokens"]:
    """Scores after so many steps of s <- A^T s."""
    for _ in range(steps):
        scores = (scores[..., None, :] @ graph)[..., 0, :]
    return scores


def _joined(
    scores: Float[Tensor, "batch heads tokens"], special: int
) -> Float[Tensor, "batch tokens"]:
    """One score for each token; those that must stay come first."""
    mean = scores.mean(dim=2, keepdim=True).clamp(min=_TINY)
    spread = (scores / mean).var(dim=2, unbiased=False)  # (batch, heads)
    speaks = (spread >= _LEAST) & (spread <= _MOST)
    speaks = speaks | ~speaks.any(dim=1, keepdim=True)
    squares = (scores.square() * speaks[..., None]).sum(dim=1) / speaks.sum(dim=1, keepdim=True)
    squares[:, :special] = torch.inf
    return squares.sqrt()


def _most_alike(
    importance: Tensor, keys: Tensor, half: int, repeated: int, special: int
) -> Bool[Tensor, "batch tokens"]:
    """True for so many of the less important half that are most like one of the other half.

    Those that must stay are in neither.
    """
    order = importance.argsort(dim=1, descending=True, stable=True)
    tokens = keys.transpose(1, 2).flatten(2)  # (batch, tokens, keyheads * size)
    direction = functional.normalize(tokens, dim=2)
    ranked = direction.gather(1, order[..., None].expand_as(direction))
    more, less = ranked[:, special:-half], ranked[:, -half:]
    likeness = (less @ more.transpose(1, 2)).amax(dim=2)  # (batch, half)
    drop = keep_highest(likeness, repeated)
    return torch.zeros_like(importance, dtype=torch.bool).scatter(1, order[:, -half:], drop)
