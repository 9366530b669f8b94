"""The products that a model makes with its weights: watched, or answered in another way.

A weight is known by where it lies in memory, so that it does not matter which module multiplies.
"""

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from layerwise.core.activation import Activation
from layerwise.core.running.evidence import AttentionWatcher, Listener, UpdateCollector, Watcher

# What a layer answers to its (tokens, in) inputs, (tokens, out), before its bias is added.
Answer = Callable[[Tensor], Tensor]


class _Mode(TorchFunctionMode, ABC):
    """Sees every call of torch's functions while it is entered."""

    @abstractmethod
    def call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a call answers."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return self.call(func, args, kwargs or {})


class Tap(_Mode):
    """Shows the input of each watched weight to its collector, whatever module multiplies it."""

    def __init__(self, watched: Mapping[int, Sequence[Watcher]]) -> None:
        super().__init__()
        self.watched = watched

    def call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a call answers."""
        if func in _PRODUCTS:
            weight = _weight(func, args, kwargs)
            for collector in self.watched.get(weight.data_ptr(), ()):
                collector.see(_columns(func, args, kwargs, weight))
        return func(*args, **kwargs)


class Listen(_Mode):
    """Shows the gradient of what each watched weight answers to its collector."""

    def __init__(self, watched: Mapping[int, Sequence[Listener]]) -> None:
        super().__init__()
        self.watched = watched

    def call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a call answers."""
        answer = func(*args, **kwargs)
        if func in _PRODUCTS:
            weight = _weight(func, args, kwargs)
            inputs = functools.partial(_columns, func, args, kwargs, weight)
            across = 1 if func is nn.functional.conv2d else -1
            for collector in self.watched.get(weight.data_ptr(), ()):
                take = collector.listening(inputs)
                answer.register_hook(functools.partial(_shown, take, across))
        return answer


class Answered(_Mode):
    """Has some weights answer in their own way instead of by a product in floats."""

    def __init__(self, answers: Mapping[int, Answer]) -> None:
        super().__init__()
        self.answers = answers

    def call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a call answers."""
        if func in _PRODUCTS:
            weight = _weight(func, args, kwargs)
            if (answer := self.answers.get(weight.data_ptr())) is not None:
                return _answered(func, args, kwargs, weight, answer)
        return func(*args, **kwargs)


class Answering(nn.Module):
    """A module whose weight answers in its own way.

    Args:
        module: A linear layer or a convolution.
        answer: What its weight answers.
    """

    def __init__(self, module: nn.Module, answer: Answer) -> None:
        super().__init__()
        self.module = module
        self.answer = answer

    def forward(self, inputs: Tensor) -> Tensor:
        """What the module answers."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        with Answered({weight.data_ptr(): self.answer}):
            return self.module(inputs)


class Attend(_Mode):
    """Shows what tokens attend to to a collector."""

    def __init__(self, collector: AttentionWatcher) -> None:
        super().__init__()
        self.collector = collector

    def call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a call answers."""
        if func is nn.functional.scaled_dot_product_attention:
            self.collector.see(_attention(*args, **kwargs))
        return func(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class Question:
    """One call of attention.

    Attributes:
        query: (batch, heads, asking, size).
        key: (batch, key heads, tokens, size).
        mask: What may be seen, if anything is said of it.
        causal: Whether a token sees only what came before.
        scale: What products are multiplied by.
    """

    query: Float[Tensor, "batch heads asking size"]
    key: Float[Tensor, "batch keyheads tokens size"]
    mask: Tensor | None
    causal: bool
    scale: float


class Asked(_Mode):
    """Shows what attention is asked.

    Args:
        take: Takes it in, before it is answered.
    """

    def __init__(self, take: Callable[[Question], None]) -> None:
        super().__init__()
        self.take = take

    def call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a call answers."""
        if func is nn.functional.scaled_dot_product_attention:
            self.take(_question(*args, **kwargs))
        return func(*args, **kwargs)


class Follow(_Mode):
    """Shows every sum of two tensors to a collector, which knows the residual stream."""

    def __init__(self, collector: UpdateCollector) -> None:
        super().__init__()
        self.collector = collector

    def call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a call answers."""
        total = func(*args, **kwargs)
        if func in _SUMS and len(args) == 2 and not kwargs:
            self.collector.see(args, total)
        return total


class RoundedKeys(_Mode):
    """Has attention see keys as a cache of rounded ones keeps them: after rotary embeddings.

    Args:
        activation: How each token's key of each head is rounded.
    """

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a call answers."""
        if func is nn.functional.scaled_dot_product_attention:
            query, key, *rest = args
            rounded = self.activation.rounded(key.flatten(0, -2)).reshape(key.shape)
            args = (query, rounded, *rest)
        return func(*args, **kwargs)


class _Kept:
    """Keeps the attention of each call."""

    def __init__(self) -> None:
        self.maps: list[Tensor] = []

    def see(self, attention: Tensor) -> None:
        """Take in a call."""
        self.maps.append(attention)


def attention_maps(model: nn.Module, given: Any) -> tuple[Tensor, list[Tensor]]:
    """What a model answers, and what its tokens attend to in each attention that it calls.

    Args:
        model: Attends by torch's scaled_dot_product_attention.
        given: What it is called with.

    Returns:
        The answer, or its logits; and one (batch, heads, asking, tokens) per call in their order.
    """
    kept = _Kept()
    with Attend(kept):
        answer = model(given)
    return getattr(answer, "logits", answer), kept.maps


def _question(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Question:
    unit = query.shape[-1] ** -0.5 if scale is None else scale
    return Question(query, key, attn_mask, is_causal, unit)


def _attention(
    query: Float[Tensor, "batch heads asking size"],
    key: Float[Tensor, "batch keys tokens size"],
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "batch heads asking tokens"]:
    """What each token attends to in each head; of one that may see nothing, nothing."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    unit = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ key.transpose(-1, -2)).float() * unit
    if is_causal:
        length = scores.shape[-2:]
        attn_mask = torch.ones(length, dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        forbidden = attn_mask.dtype == torch.bool
        scores = scores.where(attn_mask, -torch.inf) if forbidden else scores + attn_mask
    return scores.softmax(dim=-1).nan_to_num(0.0)


def _answered(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], weight: Tensor, answer: Answer
) -> Tensor:
    made = answer(_columns(func, args, kwargs, weight))  # (tokens, out)
    if func is torch.addmm:
        return args[0] + made
    inputs: Tensor = args[0]
    bias = kwargs.get("bias", args[2] if len(args) > 2 else None)
    made = made if bias is None else made + bias
    if func is nn.functional.linear:
        return made.reshape(*inputs.shape[:-1], -1)
    # A product with one picture shows how many places there are, along each axis.
    places = func(*[inputs[:1], *args[1:]], **kwargs).shape[2:]
    return made.reshape(len(inputs), -1, made.shape[1]).transpose(1, 2).unflatten(2, places)


def _shown(take: Callable[[Tensor], None], across: int, gradient: Tensor) -> None:
    take(gradient.movedim(across, -1))


_PRODUCTS = (nn.functional.linear, torch.addmm, nn.functional.conv2d)
_SUMS = (
    torch.add,
    torch.Tensor.add,
    torch.Tensor.add_,
    torch.Tensor.__add__,
    torch.Tensor.__radd__,
    torch.Tensor.__iadd__,
)


def _weight(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    return kwargs.get("weight", args[-1] if func is torch.addmm else args[1])


def _columns(func: Any, args: Sequence[Any], kwargs: Any, weight: Tensor) -> Tensor:
    """The (tokens, in) matrix that a weight's (out, in) matrix multiplies."""
    if func is torch.addmm:
        return args[1]
    inputs: Tensor = args[0]
    if func is nn.functional.linear:
        return inputs.reshape(-1, inputs.shape[-1])
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = (
        {"stride": 1, "padding": 0, "dilation": 1} | dict(zip(names, args, strict=False)) | kwargs
    )
    padding: Any = given["padding"]
    if isinstance(padding, str):
        inputs, padding = _padded(inputs, padding, weight, given["dilation"]), 0
    patches = nn.functional.unfold(
        inputs,
        weight.shape[2:],
        dilation=given["dilation"],
        padding=padding,
        stride=given["stride"],
    )  # (batch, in, places)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def _padded(inputs: Tensor, padding: str, weight: Tensor, dilation: Sequence[int]) -> Tensor:
    """Inputs with the zeros that "same" (or no "valid") padding adds: the odd one comes last."""
    if padding == "valid":
        return inputs
    sides: list[int] = []
    for kernel, spread in zip(weight.shape[:1:-1], dilation[::-1], strict=True):
        total = spread * (kernel - 1)
        sides += [total // 2, total - total // 2]
    return nn.functional.pad(inputs, sides)


def located(model: nn.Module, name: str) -> str:
    """What a model calls a module or parameter of its files, which may leave the base's name out.

    Args:
        model: A model of transformers.
        name: Its name in the files.
    """
    known = {known for known, _ in itertools.chain(model.named_modules(), model.named_parameters())}
    return name if name in known else f"{getattr(model, 'base_model_prefix', '')}.{name}"
