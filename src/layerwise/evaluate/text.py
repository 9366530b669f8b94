"""How a model answers a text: alone, and against the model it was made from."""

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float64, Int
from torch import Tensor
from torch.nn import functional

from layerwise.core.errors import UserError
from layerwise.core.reading.text import Windows
from layerwise.core.telling.outcome import Comparison


def compare(
    windows: Windows,
    results: Sequence[Iterable[Tensor]],
    before: Iterable[Tensor] | None,
    first: int = 0,
) -> list[Comparison]:
    """Perplexity, and divergence from the original, over windows of text.

    The first token of a window is not predicted.  KL is from the original to the result, in nats
    per token; sums are in float64.

    Args:
        windows: What was read: token ids, (windows, length).
        results: For each model to judge its logits, batch after batch, (batch, length, vocabulary).
        before: The same of the original, in the same batches.
        first: Only what a window's tokens from this one on foretell is judged.

    Returns:
        One for each of `results`, all from one reading of the original.

    Raises:
        UserError: A model answers NaN.
    """
    ids = windows.ids
    seen: list[list[Tensor]] = [[] for _ in results]
    streams = [iter(result) for result in results]
    originals = None if before is None else iter(before)
    start = 0
    while start < len(ids):
        reference = None if originals is None else _scored(next(originals), first)
        size = 0
        for stream, measured in zip(streams, seen, strict=True):
            scored = _scored(next(stream), first)
            size = len(scored)
            measured.append(_per_window(scored, reference, ids[start : start + size, first:]))
        start += size
    return [_comparison(windows, torch.cat(measured), first) for measured in seen]


def _scored(logits: Tensor, first: int) -> Tensor:
    return functional.log_softmax(logits[:, first:-1].float(), dim=-1)


def _per_window(
    scored: Tensor, reference: Tensor | None, ids: Int[Tensor, "windows length"]
) -> Float64[Tensor, "windows columns"]:
    """Means over a window: cross-entropy; with an original its own, KL and agreement."""
    tokens = ids.shape[1] - 1
    columns = [_cross_entropy(scored, ids)]
    if reference is not None:
        divergence = functional.kl_div(scored, reference, reduction="none", log_target=True)
        agreed = scored.argmax(dim=-1) == reference.argmax(dim=-1)
        columns += [
            _cross_entropy(reference, ids),
            divergence.sum(dim=(1, 2), dtype=torch.float64),
            agreed.sum(dim=1, dtype=torch.float64),
        ]
    return torch.stack(columns, dim=1) / tokens


def _cross_entropy(scored: Tensor, ids: Tensor) -> Tensor:
    return -scored.gather(2, ids[:, 1:, None]).sum(dim=(1, 2), dtype=torch.float64)


def _comparison(
    windows: Windows, measured: Float64[Tensor, "windows columns"], first: int
) -> Comparison:
    count, length = windows.ids.shape
    entropy, *rest = measured.mean(dim=0).tolist()
    if not math.isfinite(entropy):
        raise UserError(
            "the model answers NaN or infinity.", "Its weights are damaged: use another checkpoint."
        )
    entropy_error, *errors = _standard_errors(measured)
    entropy_before, kl, top1 = rest or (None, None, None)
    entropy_before_error, kl_error, top1_error = errors or (None, None, None)
    added = measured[:, :1] - measured[:, 1:2] if rest else None
    return Comparison(
        tokens=count * (length - 1 - first),
        perplexity=math.exp(entropy),
        perplexity_before=None if entropy_before is None else math.exp(entropy_before),
        kl=kl,
        top1=top1,
        text=windows.label,
        windows=count,
        length=length,
        digest=windows.digest,
        special=windows.special,
        perplexity_error=_through_exp(entropy, entropy_error),
        perplexity_before_error=_through_exp(entropy_before, entropy_before_error),
        loss_added=None if added is None else float(added.mean()),
        loss_added_error=None if added is None else _standard_errors(added)[0],
        kl_error=kl_error,
        top1_error=top1_error,
    )


def _standard_errors(measured: Float64[Tensor, "windows columns"]) -> list[float | None]:
    """Of each column's mean: s / sqrt(n), windows taken as independent draws."""
    count, columns = measured.shape
    if count == 1:
        return [None] * columns
    errors: list[float | None] = (measured.std(dim=0) / count**0.5).tolist()
    return errors


def _through_exp(entropy: float | None, error: float | None) -> float | None:
    """Standard error of exp(entropy), by the delta method."""
    return None if entropy is None or error is None else math.exp(entropy) * error
