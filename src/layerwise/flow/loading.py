"""Models loaded as their users will load them, and what they answer."""

import contextlib
import copy
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwise import export
from layerwise.core.economy import MICRO_BATCH_TOKENS, windows_at_once
from layerwise.core.errors import UserError
from layerwise.core.extras import need
from layerwise.core.format import Format
from layerwise.core.reading.checkpoint import Checkpoint, Source
from layerwise.core.reading.families import CAUSAL_MODELS
from layerwise.core.running.products import Answering, located


def load(
    source: Checkpoint,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    budget: int | None = None,
) -> Any:
    """Load a model directory as its users will, with transformers and what its format needs.

    An adapter that lies in the directory is loaded over the model, with peft.

    Args:
        source: The directory, opened.
        dtype: What it is to compute in.
        trust_remote_code: Let it bring its own Python.
        budget: Most bytes of its tensors that are read, as they are stored; None is all.

    Raises:
        UserError: It is no such directory, has no such size, lacks a weight, or a package it
            needs is missing.
    """
    transformers = need("transformers", "loading a model")
    format = _format(source) if budget is None else files_within(source, budget)
    if format is not None:
        need_packages(format, f"reading {source.label}")
    transformers.utils.logging.disable_progress_bar()
    architecture = (source.config.get("architectures") or [""])[0]
    known = cast("Any", getattr(transformers, architecture, None))
    with _without_bars():
        loaded = None if format is None or known is None else format.load(dtype)
    state = None if format is None or loaded else format.read()
    if known is None and (state is not None or not trust_remote_code):
        raise UserError(
            f"{source.label} is a {architecture or 'model of unknown class'}, which transformers "
            "does not have: its code is remote.",
            "Read that code, then add --trust-remote-code (files in layerwise's own format need "
            "a class of transformers).",
        )
    with _without_bars():
        model, missing = loaded or _by_transformers(
            source, known, state, dtype=dtype, trust_remote_code=trust_remote_code
        )
    if missing:
        raise UserError(
            f"{source.label} lacks {', '.join(missing[:3])}{' and more' * (len(missing) > 3)}, "
            "which transformers would fill with random numbers.",
            "Download it again: the checkpoint is not whole, or its config.json is another's.",
        )
    # Experts of a compressed checkpoint are joined in the dtype of their scales, whatever is asked.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    _have_answered(model, format)
    if (folder := adapter_of(source)) is not None:
        peft = need("peft", f"the adapter of {source.label}")
        # Compressed layers have no weight, which peft looks for, before they have answered once.
        for _ in answers(model, torch.zeros(1, 1, dtype=torch.long)):
            pass
        with _without_bars():
            model = peft.PeftModel.from_pretrained(model, str(folder))
    return model.eval()


def load_into(source: Checkpoint, module: nn.Module, budget: int | None = None) -> nn.Module:
    """A copy of a module with the weights that a directory holds, each in the module's dtype.

    Args:
        source: The directory, opened: safetensors, or what layerwise made of such a module.
        module: What it was made from, or one with its parameters and buffers.
        budget: Most bytes of its tensors that are read, as they are stored; None is all.

    Raises:
        UserError: The directory lacks some of them, has one of another shape, or no such size.
    """
    format = _format(source) if budget is None else files_within(source, budget)
    read = None if format is None else format.read()
    state = read or {name: source.read(name) for name in source.tensors}
    made = copy.deepcopy(module).eval()
    for name, wanted in made.state_dict(keep_vars=True).items():
        if name not in state or state[name].shape != wanted.shape:
            has = f"has {tuple(state[name].shape)}" if name in state else "has none"
            raise UserError(
                f"{type(module).__name__} has a tensor {name} of {tuple(wanted.shape)}; "
                f"{source.label} {has}.",
                "Give a module of the class and the sizes that the directory was made from.",
            )
    made.load_state_dict(state, strict=False)
    _have_answered(made, format)
    return made


def _have_answered(model: nn.Module, format: Format | None) -> None:
    """Have layers answer as their format says, where that is no product with their weight."""
    for name, answer in ({} if format is None else format.answers()).items():
        parent, _, last = name.rpartition(".")
        holder = model.get_submodule(parent)
        setattr(holder, last, Answering(getattr(holder, last), answer))


def _by_transformers(
    source: Checkpoint,
    known: Any,
    state: Mapping[str, Tensor] | None,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> tuple[Any, Sequence[str]]:
    """The model by `from_pretrained`, and the weights that were not in its files."""
    transformers = need("transformers", "loading a model")
    folder = str(source.folder)
    options: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "output_loading_info": True,
    }
    if known is None or (causal(source) and state is None):
        model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    elif state is None:
        model, told = known.from_pretrained(folder, **options)
    else:
        config = known.config_class.from_pretrained(folder)
        del config.quantization_config
        model, told = known.from_pretrained(None, config=config, state_dict=dict(state), **options)
    return model, sorted(told["missing_keys"])


def loader_of(source: Checkpoint, model: Any) -> str:
    """What loaded a model from its files, and as what, in words."""
    format = _format(source)
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    loader = "transformers" if format is None else format.loader
    return f"{loader} {type(base).__name__}" + " and peft" * (base is not model)


def adapter_of(source: Checkpoint) -> Path | None:
    """The folder of the adapter that corrects a model directory; None if it has none."""
    config = source.folder / export.ADAPTER_CONFIG
    return config.parent if config.exists() else None


def _format(source: Checkpoint) -> Format | None:
    """The format of ours that a model says it is stored in."""
    name = (source.config.get("quantization_config") or {}).get("quant_method", "")
    return export.get(name, source) if name in export.FORMATS else None


def files_within(source: Checkpoint, budget: int) -> Format:
    """Files of ours that are read as far as a budget allows.

    Raises:
        UserError: They are of one size, or of one that is larger.
    """
    format = _format(source)
    if format is None:
        raise UserError(f"{source.label} can be loaded in one size only.", "Leave the budget out.")
    return format.within(budget)


def causal(source: Source) -> bool:
    """Whether a model foretells the next token of a text."""
    architecture = (source.config.get("architectures") or [""])[0]
    return architecture.endswith(CAUSAL_MODELS)


class LoadedTrial:
    """A loaded model, to try other tensors in.

    Args:
        model: The model; what is put into it stays there.
        ids: Windows that its loss is taken on.
        tokens: How many are answered at once, about.
    """

    def __init__(self, model: Any, ids: Tensor, tokens: int) -> None:
        self.model = model
        self.ids = ids
        self.tokens = tokens

    def put(self, tensor: str, value: Tensor) -> None:
        """Give it other values for a tensor, by its name in the original."""
        with torch.no_grad():
            self.model.get_parameter(located(self.model, tensor)).copy_(value)

    def loss(self) -> float:
        """Its mean cross-entropy in nats per token."""
        total, start = 0.0, 0
        for logits in answers(self.model, self.ids, self.tokens):
            shown = self.ids[start : start + len(logits)]
            found, asked = logits[:, :-1].float().flatten(0, 1), shown[:, 1:].flatten()
            total += float(functional.cross_entropy(found, asked, reduction="sum"))
            start += len(logits)
        return total / self.ids[:, 1:].numel()


def need_packages(format: Format, purpose: str) -> None:
    """Import what transformers needs to load a format.

    Raises:
        UserError: Some of it is not installed.
    """
    with _without_bars():
        for package in format.packages:
            need(package, purpose)


def answers(model: Any, ids: Tensor, tokens: int = MICRO_BATCH_TOKENS) -> Iterator[Tensor]:
    """Logits of a loaded model, batch after batch of about so many tokens at most."""
    vocabulary = int(getattr(getattr(model, "config", None), "vocab_size", 0))
    options = {"use_cache": False} if getattr(model, "can_generate", bool)() else {}
    for part in ids.split(windows_at_once(ids.shape[1], vocabulary, tokens)):
        # What some loaders compile for a few windows takes longer than all of them.
        eagerly = torch.compiler.set_stance("force_eager")
        with torch.no_grad(), _without_bars(), eagerly:
            found = model(part, **options)
        # Yielded outside: a generator left half-way must not hold the caller's grad mode.
        yield found if isinstance(found, Tensor) else found.logits


def _without_bars() -> contextlib.AbstractContextManager[object]:
    """What loads and unpacks compressed layers draws bars and banners, terminal or not.

    It also warns of what its packages ask of each other.
    """
    quiet = contextlib.ExitStack()
    quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
    quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
    quiet.enter_context(warnings.catch_warnings(action="ignore"))
    return quiet
