"""How good a model still is: against its text, and against the model it was made from."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from layerwise.core.errors import UserError
from layerwise.core.outcome import Comparison


def compare(
    ids: Tensor, after: Iterable[Tensor], before: Iterable[Tensor] | None, text: str
) -> Comparison:
    """Perplexity, and divergence from the original, over windows of text.

    The first token of a window is not predicted.  KL is from the original to the result, in nats
    per token; cross-entropies are summed in float64.

    Args:
        ids: Token ids, (windows, length).
        after: Logits of the result, batch after batch, (batch, length, vocabulary).
        before: The same of the original.
        text: Where the windows came from.
    """
    totals = torch.zeros(4, dtype=torch.float64)  # cross-entropy, the original's, KL, agreement
    start = 0
    originals: Iterator[Tensor] | None = iter(before) if before is not None else None
    for logits in after:
        batch = ids[start : start + len(logits)]
        start += len(logits)
        scored = functional.log_softmax(logits[:, :-1].float(), dim=-1)
        totals[0] += _cross_entropy(scored, batch)
        if originals is not None:
            reference = functional.log_softmax(next(originals)[:, :-1].float(), dim=-1)
            totals[1] += _cross_entropy(reference, batch)
            divergence = functional.kl_div(scored, reference, reduction="none", log_target=True)
            totals[2] += divergence.sum(dtype=torch.float64)
            totals[3] += (scored.argmax(dim=-1) == reference.argmax(dim=-1)).sum()
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    entropy, entropy_before, divergence_sum, agreed = (totals / tokens).tolist()
    if not math.isfinite(entropy):
        raise UserError(
            "the model answers NaN or infinity.", "Its weights are damaged: use another checkpoint."
        )
    if before is None:
        return Comparison(tokens, math.exp(entropy), None, None, None, text)
    return Comparison(
        tokens, math.exp(entropy), math.exp(entropy_before), divergence_sum, agreed, text
    )


def _cross_entropy(scored: Tensor, ids: Tensor) -> Tensor:
    return -scored.gather(2, ids[:, 1:, None]).sum(dtype=torch.float64)
