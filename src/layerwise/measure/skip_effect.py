"""Depth efficiency: what becomes of later blocks and of the answer without a block."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import measure
from layerwise.measure._tokens import Answers, centre, column, pairs


def _across(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Depth scores: where the effects on later blocks lie, on all tokens and on later ones."""
    return {name: centre(column(records, name)) for name in ("later", "future")}


@measure(
    Paper("Do Language Models Use Their Depth Efficiently?", 2025, "2505.13898"),
    unit="block",
    across=_across,
)
def skip_effect(
    answers: Answers,
    skipped: Answers,
    frozen: Answers,
    skip_effects: Float[Tensor, "later windows length"],
    freeze_effects: Float[Tensor, "later windows length"],
    *,
    over: str = "max",
) -> dict[str, float]:
    """Score a block by how much the answer and the work of later blocks change without it.

    Block s is skipped: it answers with what it is given.  With u_l what block l adds to the
    residual stream, u'_l what it adds then, and p, p' the model's answers,

        O_s   = max over tokens of ||p - p'||_2
        E_s,l = max over tokens of ||u_l - u'_l|| / ||u_l|| ,    l > s
        e_s   = mean over l > s of E_s,l

        output         O_s, block s skipped for all tokens
        later          e_s, block s skipped for all tokens
        future_output  O_s, block s skipped for the first half of a window, on the second half
        future         e_s, likewise

    A window's first token is never skipped, nor looked at: attention rests on it.  The largest
    over tokens is taken in each window, and the mean of these over windows.  A largest value grows
    with the number of tokens: compare models on windows of one length, or by over="mean".

    Unlike the paper, which draws the place from which on a block is skipped no more, it is the
    middle of a window; and the mean is taken over windows and not the largest.  An ||u_l|| below
    1e-6 counts as that; the last block has no later ones, so that its e is 0.

    For B blocks it takes B^2 / 2 passes of 16 windows through a block, twice.

    Args:
        answers: Log-probabilities of what the model answers.
        skipped: Of what it answers without the block, for all tokens but the first.
        frozen: Of what it answers without the block for the first half, less its first token.
        skip_effects: E of every token, where the block is `skipped`.
        freeze_effects: The same where it is `frozen`.
        over: What is taken over the tokens of a window: "max" or "mean".

    Returns:
        The record above; its score is `output`, higher is more important.

    Raises:
        UserError: `over` is neither.
    """
    if over not in ("max", "mean"):
        raise UserError(f"there is no {over!r} over tokens.", 'Give "max" or "mean".')
    moved = [(p.exp() - q.exp()).norm(dim=-1) for p, q in pairs(answers, skipped)]
    left = [(p.exp() - q.exp()).norm(dim=-1) for p, q in pairs(answers, frozen)]
    half = left[0].shape[1] // 2
    return {
        "output": float(_over(torch.cat(moved)[:, 1:], over).mean()),
        "later": _effect(skip_effects[:, :, 1:], over),
        "future_output": float(_over(torch.cat(left)[:, half:], over).mean()),
        "future": _effect(freeze_effects[:, :, half:], over),
    }


def _effect(effects: Float[Tensor, "later windows length"], over: str) -> float:
    """Mean over later blocks; 0 without one."""
    return float(_over(effects, over).mean()) if len(effects) else 0.0


def _over(values: Float[Tensor, "*many length"], over: str) -> Float64[Tensor, "*many"]:
    return values.double().amax(dim=-1) if over == "max" else values.double().mean(dim=-1)
