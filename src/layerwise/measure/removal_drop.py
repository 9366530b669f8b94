"""Curse of depth: what the loss of the model gains when a block is taken out."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import measure
from layerwise.measure._tokens import Answers, column, divergence, mean, pairs

# A block whose removal costs less than this, in nats per token, is not missed.
_TOLERANCE = 0.02


def _across(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The share of blocks that are not missed, of all and of the second half."""
    missed = [drop >= _TOLERANCE for drop in column(records, "drop")]
    half = missed[len(missed) // 2 :]
    return {"idle": 1 - sum(missed) / len(missed), "idle_late": 1 - sum(half) / len(half)}


@measure(
    Paper("The Curse of Depth in Large Language Models", 2025, "2502.05795"),
    unit="block",
    across=_across,
)
def removal_drop(
    answers: Answers, removed: Answers, ids: Int64[Tensor, "windows length"]
) -> dict[str, float]:
    """Score a block by how much worse the model foretells a text without it.

        drop = loss without the block - loss    (mean cross-entropy of the next token)
        kl   = mean over tokens of KL(p || p') ,    p' = the answer without the block

    In the curse of depth, nearly half of the blocks can go.  The paper does not say from what drop
    on a block counts: across the model, `idle` is the share of blocks with a drop below 0.02 nats,
    and `idle_late` that of the second half.

    For B blocks it takes B^2 / 2 passes of 16 windows through a block.

    Args:
        answers: Log-probabilities of what the model answers.
        removed: Of what it answers without the block.
        ids: The tokens that both foretell.

    Returns:
        The record above, in nats per token; its score is `drop`, higher is more important.
    """
    added: list[Tensor] = []
    lost: list[Tensor] = []
    start = 0
    for known, changed in pairs(answers, removed):
        shown = ids[start : start + len(known)]
        added.append(_likelihood(known, shown) - _likelihood(changed, shown))
        lost.append(divergence(known[:, :-1], changed[:, :-1]).flatten())
        start += len(known)
    return {"drop": mean(torch.cat(added)), "kl": mean(torch.cat(lost))}


def _likelihood(
    answers: Float[Tensor, "windows length vocabulary"], ids: Int64[Tensor, "windows length"]
) -> Float64[Tensor, " predicted"]:
    """The logarithm of what each next token was given, (windows * (length - 1),)."""
    return answers[:, :-1].gather(2, ids[:, 1:, None]).double().flatten()
