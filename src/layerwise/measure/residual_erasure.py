"""Depth efficiency: whether a token's place in the residual stream is still read by others."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import measure
from layerwise.measure._tokens import Answers, centre, column, pairs

# Of the largest effect, what still counts.
_MATTERS = 0.1


def _across(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The last block before which it matters, as a share of the depth; and where it does."""
    found = column(records, "erased")
    last = max(n for n, one in enumerate(found) if one >= _MATTERS * max(found))
    return {"last": (last + 1) / len(found), "centre": centre(found)}


@measure(
    Paper("Do Language Models Use Their Depth Efficiently?", 2025, "2505.13898"),
    unit="block",
    across=_across,
)
def residual_erasure(
    answers: Answers, erased: Answers, ids: Int64[Tensor, "windows length"]
) -> dict[str, float]:
    """Score a block by what later tokens lose when a token is erased before it.

    What the block is given of the token in the middle of a window is replaced by its mean over all
    tokens of the text.  With p the probability of the true next token, and p' without that token,

        erased  mean over windows of the largest |p - p'| over later tokens
        mean    mean over windows and later tokens of |p - p'|

    A token that was read before can be erased without harm: from the block on where `erased` is
    near 0, other tokens take nothing of it any more.

    Unlike the paper, which erases each token of a prompt in its turn and looks at the answer, it
    is one token a window and all that come later.  Across the model, `last` is the last block, from
    1 and as a share of all, before which it matters: at least a tenth of the largest effect, which
    is ours; and `centre` the mean place from 0, weighed by `erased`.

    For B blocks it takes B^2 / 2 passes of 16 windows through a block.

    Args:
        answers: Log-probabilities of what the model answers.
        erased: Of what it answers without that token.
        ids: The tokens that both foretell.

    Returns:
        The record above; its score is `erased`, from 0 to 1, higher is more important.
    """
    changed: list[Float64[Tensor, "_ later"]] = []
    start = 0
    for known, left in pairs(answers, erased):
        shown = ids[start : start + len(known)]
        later = known.shape[1] // 2 + 1
        moved = _chance(known, shown) - _chance(left, shown)  # (windows, length - 1)
        changed.append(moved[:, later:].abs())
        start += len(known)
    found = torch.cat(changed)
    if not found.numel():
        return {"erased": 0.0, "mean": 0.0}
    return {"erased": float(found.amax(dim=1).mean()), "mean": float(found.mean())}


def _chance(
    answers: Tensor, ids: Int64[Tensor, "windows length"]
) -> Float64[Tensor, "windows predicted"]:
    return answers[:, :-1].gather(2, ids[:, 1:, None])[..., 0].double().exp()
