"""How good a model still is: against its text, and against the model it was made from."""

import contextlib
import io
import math
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from layerwise import export
from layerwise.core.checkpoint import Checkpoint
from layerwise.core.economy import MICRO_BATCH_TOKENS, windows_at_once
from layerwise.core.errors import UserError
from layerwise.core.extras import need
from layerwise.core.format import Format
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


def load(
    source: Checkpoint, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> Any:
    """Load a model directory as its users will, with transformers.

    Args:
        source: The directory, opened.
        dtype: What it is to compute in.
        trust_remote_code: Let it bring its own Python.

    Raises:
        UserError: It is no such directory, lacks a weight, or a package it needs is missing.
    """
    folder = str(source.folder)
    transformers = need("transformers", "loading a model")
    format = _format(source)
    if format is not None:
        need_packages(format, f"reading {source.label}")
    transformers.utils.logging.disable_progress_bar()
    architecture = (source.config.get("architectures") or [""])[0]
    known = cast("Any", getattr(transformers, architecture, None))
    state = None if format is None else format.read()
    if known is None and (state is not None or not trust_remote_code):
        raise UserError(
            f"{source.label} is a {architecture or 'model of unknown class'}, which transformers "
            "does not have: its code is remote.",
            "Read that code, then add --trust-remote-code (files in layerwise's own format need "
            "a class of transformers).",
        )
    options: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "output_loading_info": True,
    }
    causal = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    with _without_bars():
        if known is None or (causal and state is None):
            loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        elif state is None:
            loaded = known.from_pretrained(folder, **options)
        else:
            config = known.config_class.from_pretrained(folder)
            del config.quantization_config
            loaded = known.from_pretrained(None, config=config, state_dict=dict(state), **options)
    model, told = loaded
    if missing := sorted(told["missing_keys"]):
        raise UserError(
            f"{source.label} lacks {', '.join(missing[:3])}{' and more' * (len(missing) > 3)}, "
            "which transformers would fill with random numbers.",
            "Download it again: the checkpoint is not whole, or its config.json is another's.",
        )
    # Experts of a compressed checkpoint are joined in the dtype of their scales, whatever is asked.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def _format(source: Checkpoint) -> Format | None:
    """The format of ours that a model says it is stored in."""
    name = (source.config.get("quantization_config") or {}).get("quant_method", "")
    return export.get(name, source) if name in export.FORMATS else None


def need_packages(format: Format, purpose: str) -> None:
    """Import what transformers needs to load a format.

    Raises:
        UserError: Some of it is not installed.
    """
    for package in format.packages:
        need(package, purpose)


def answers(model: Any, ids: Tensor, tokens: int = MICRO_BATCH_TOKENS) -> Iterator[Tensor]:
    """Logits of a loaded model, batch after batch of about so many tokens at most."""
    vocabulary = int(getattr(model.config, "vocab_size", 0))
    options = {"use_cache": False} if getattr(model, "can_generate", bool)() else {}
    for part in ids.split(windows_at_once(ids.shape[1], vocabulary, tokens)):
        with torch.no_grad(), _without_bars():
            found = model(part, **options).logits
        # Yielded outside: a generator left half-way must not hold the caller's grad mode.
        yield found


def _without_bars() -> contextlib.AbstractContextManager[object]:
    """What loads and unpacks compressed layers draws bars of its own, terminal or not."""
    return contextlib.redirect_stderr(io.StringIO())
