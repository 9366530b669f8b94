"""Models loaded as their users will load them, and what they answer."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from layerwise import export
from layerwise.core.checkpoint import Checkpoint
from layerwise.core.errors import UserError
from layerwise.core.extras import need
from layerwise.core.families import CAUSAL_MODELS
from layerwise.core.format import Format

_BATCH_TOKENS = 4096


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
    causal = architecture.endswith(CAUSAL_MODELS)
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


def answers(model: Any, ids: Tensor) -> Iterator[Tensor]:
    """Logits of a loaded model, batch after batch of at most `_BATCH_TOKENS`."""
    for part in ids.split(max(1, _BATCH_TOKENS // ids.shape[1])):
        with torch.no_grad(), _without_bars():
            found = model(part).logits
        # Yielded outside: a generator left half-way must not hold the caller's grad mode.
        yield found


def _without_bars() -> contextlib.AbstractContextManager[object]:
    """What loads and unpacks compressed layers draws bars of its own, terminal or not."""
    return contextlib.redirect_stderr(io.StringIO())
