"""Logit lens: what the model would answer if its residual stream ended before a block."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import measure
from layerwise.measure._tokens import Answers, centre, column, divergence, mean, pairs


def _across(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Where the divergence lies, and the share of blocks before which it is less than before."""
    found = column(records, "kl")
    falls = [after < before for before, after in itertools.pairwise(found)]
    return {"centre": centre(found), "falls": sum(falls) / max(1, len(falls))}


@measure(
    Paper("Do Language Models Use Their Depth Efficiently?", 2025, "2505.13898"),
    unit="block",
    across=_across,
)
def logit_lens(lens: Answers, answers: Answers, *, top: int = 5) -> dict[str, float]:
    """Score a block by how far the model's answer is from ready when the block begins.

    The final norm and the head are laid over what the block is given:

        q = softmax(head(norm(h))) ,    p = the model's answer
        kl      = mean over tokens of KL(q || p)
        overlap = mean over tokens of |top-5 of q and of p| / 5

    Where a model has long decided, its last blocks only refine.  After the last block the lens is
    the answer itself: kl 0, overlap 1.

    Of each window the first token does not count.  Of equally likely tokens any may be among the
    top, so a lens that knows nothing overlaps by chance.

    Across the model, `centre` is the mean of the block's place from 0, weighed by kl, and `falls`
    the share of steps from block to block in which kl falls.

    Args:
        lens: Log-probabilities of what the model would answer.
        answers: Of what it answers.
        top: The likeliest tokens that are looked at.

    Returns:
        The record above; its score is `kl` in nats, higher is more left to do.

    Raises:
        UserError: The vocabulary has no so many tokens.
    """
    lost: list[Tensor] = []
    common: list[Tensor] = []
    for shown, final in pairs(lens, answers):
        if not 1 <= top <= final.shape[-1]:
            raise UserError(
                f"the {top} likeliest of {final.shape[-1]} tokens are asked for.",
                f"Give from 1 to {final.shape[-1]}.",
            )
        lost.append(divergence(shown[:, 1:], final[:, 1:]).flatten())
        best = [part[:, 1:].topk(top, dim=-1).indices for part in (shown, final)]
        both = best[0][..., :, None] == best[1][..., None, :]  # (windows, length, top, top)
        common.append(both.sum(dim=(-1, -2)).double().flatten() / top)
    return {"kl": mean(torch.cat(lost)), "overlap": mean(torch.cat(common))}
