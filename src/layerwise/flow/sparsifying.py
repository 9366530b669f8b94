"""Sparsify: have a loaded model leave work out while it runs, and count what that saves."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from layerwise.core import catalogue
from layerwise.core.catalogue import Method
from layerwise.core.economy import windows_at_once
from layerwise.core.errors import UserError
from layerwise.core.extras import need
from layerwise.core.reading.text import Text
from layerwise.core.running.skipping import (
    Frozen,
    Group,
    Sparse,
    blocks_of,
    linear_layers,
    skip_blocks,
    skip_inputs,
    skip_tokens,
)
from layerwise.core.running.tally import Tally
from layerwise.core.telling.outcome import Savings
from layerwise.flow.loading import answers

CALIBRATION_WINDOWS = 32
# Windows on which each level of each layer is tried, and the levels.
_TRIED = 8
_LEVELS = torch.arange(1, 11) / 10

# What a method leaves out, by evidence that it reads, the first that fits; and what beside its
# density can be said of that.
_SETTINGS: Mapping[str, frozenset[str]] = {
    "attentions": frozenset({"after"}),
    "activations": frozenset({"first", "orthogonal", "allocate", "calibration"}),
    "scores": frozenset({"prompt", "calibration"}),
    "keys": frozenset({"prompt", "recent"}),
}


@dataclass(frozen=True, slots=True)
class Skipping:
    """What a model is to leave out; what is None is as the method's kind has it.

    Attributes:
        method: A sparsifier.
        density: Fraction to keep; of inputs also for each layer by name.
        options: The method's own.
        first: Part of a text, from its beginning, that skips no inputs (0.01).
        orthogonal: Turn inputs so that a weight that reads them has orthogonal columns (no).
        allocate: Allocator that shares the density out among the layers of each block (none: all
            get the same).
        after: Numbers of the blocks after which tokens leave (one, a third of the way).
        prompt: Part of a text, from its beginning, whose keys are thinned, or whose tokens are
            frozen; for the latter also which positions (0.5).
        recent: Tokens at the end of a prompt whose keys stay whole (32).
        calibration: Text on which contributions of blocks, or errors of layers, are found.
    """

    method: str
    density: float | Mapping[str, float]
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    first: float | None = None
    orthogonal: bool | None = None
    allocate: str | None = None
    after: Sequence[int] | None = None
    prompt: Group | None = None
    recent: int | None = None
    calibration: Text | None = None

    def found(self) -> Method:
        """The method.

        Raises:
            UserError: There is none of that name, it has no such option, a density is no fraction,
                or something is said of what it does not leave out.
        """
        method = catalogue.get(f"sparsify/{self.method}")
        given = self.density.values() if isinstance(self.density, Mapping) else [self.density]
        for density in given:
            if not 0 < density <= 1:
                raise UserError(
                    f"density {density} is outside (0, 1].", "Give the fraction to keep."
                )
        if unknown := self.options.keys() - method.own_options.keys():
            raise UserError(
                f"{method.id} has no option {sorted(unknown)[0]}.",
                f"It has {', '.join(method.own_options) or 'none'}.",
            )
        allowed = _SETTINGS[kind(method)]
        for name in SAID:
            if getattr(self, name) is not None and name not in allowed:
                raise UserError(
                    f"{name} says nothing to {method.id}, which goes by {kind(method)}.",
                    f"Leave it out; what can be said is {', '.join(sorted(allowed))}.",
                )
        for name, part in (("first", self.first), ("prompt", self.prompt)):
            if not isinstance(part, Tensor) and part is not None and not 0 <= part < 1:
                raise UserError(
                    f"{name} {part} is no part of a text that something follows.",
                    "Give a fraction from 0 to below 1.",
                )
        return method


# What can be said beside a density and a method's own options.
SAID = tuple(
    one.name for one in fields(Skipping) if one.name not in ("method", "density", "options")
)


def skipping(
    method: str, density: float | Mapping[str, float], said: Mapping[str, Any]
) -> Skipping:
    """What is to be left out, of fields by name.

    Raises:
        UserError: There is no such field.
    """
    known = {*SAID, "options"}
    if unknown := said.keys() - known:
        raise UserError(
            f"nothing can be said of {sorted(unknown)[0]} where work is left out.",
            f"What can be said is {', '.join(sorted(known))}.",
        )
    return Skipping(method, density, **said)


def kind(method: Method) -> str:
    """What a method leaves out, as the evidence that shows it."""
    return next(word for word in _SETTINGS if word in method.evidence)


def sparsified(model: Any, wanted: Skipping, calibration: Tensor | None) -> Sparse:
    """Have a loaded model leave work out.

    Args:
        model: The model, which is changed in how it runs until `remove`.
        wanted: What is left out.
        calibration: Windows of token ids, where contributions of blocks are to be found.

    Raises:
        UserError: It cannot be left out of this model.
    """
    method = wanted.found()
    what = kind(method)
    density = wanted.density
    if what == "activations":
        return _masked(model, method, density, wanted, calibration)
    if isinstance(density, Mapping):
        raise UserError(f"{method.id} has one density, not one for each layer.", "Give one number.")
    if what == "attentions":
        third = max(1, len(blocks_of(model)) // 3)
        after = (third - 1,) if wanted.after is None else wanted.after
        return skip_tokens(model, method, density, wanted.options, after=after)
    if what == "keys":
        need("transformers", "a cache of keys")
        from layerwise.core.running.thinned import thin_keys

        recent = 32 if wanted.recent is None else wanted.recent
        return thin_keys(model, method, density, wanted.options, recent=recent)
    return _frozen(model, method, density, wanted, calibration)


def _masked(
    model: Any,
    method: Method,
    density: float | Mapping[str, float],
    wanted: Skipping,
    calibration: Tensor | None,
) -> Sparse:
    how: dict[str, Any] = {
        "first": 0.01 if wanted.first is None else wanted.first,
        "orthogonal": bool(wanted.orthogonal),
    }
    if wanted.allocate is not None:
        if calibration is None or isinstance(density, Mapping):
            raise UserError(
                f"{wanted.allocate} shares one density out by what layers lose on a text.",
                "Give one density, and a calibration text.",
            )
        skip = functools.partial(skip_inputs, model, method, options=wanted.options, **how)
        density = shared_out(model, skip, density, wanted.allocate, calibration[:_TRIED])
    return skip_inputs(model, method, density, wanted.options, **how)


@torch.no_grad()
def shared_out(
    model: nn.Module,
    skip: Callable[..., Sparse],
    density: float,
    allocate: str,
    ids: Int[Tensor, "windows length"],
) -> dict[str, float]:
    """A density for each layer, such that those of each block have that density together.

    An allocator spends the weights that a block may multiply by on its layers, so that the
    squared errors of the block's output, which each level of each layer alone brings to it, add
    up to the least.

    Unlike the greedy walk of TEAL and WINA, which tries the next step of every layer beside the
    levels that the others have by then, a layer is tried with the others whole.

    Args:
        model: A causal language model.
        skip: Has it skip inputs, given the density of each layer.
        density: Of each block.
        allocate: An allocator that reads errors or costs.
        ids: Windows of a text.

    Raises:
        UserError: The allocator reads something else, or the density is below the lowest level.
    """
    allocator = catalogue.get(f"allocate/{allocate}")
    if not set(allocator.evidence) <= {"errors", "costs"}:
        raise UserError(
            f"{allocator.id} reads {', '.join(allocator.evidence)}; only errors and costs are "
            "known of inputs that are skipped.",
            "Use knapsack.",
        )
    whole = dict.fromkeys(linear_layers(model), 1.0)
    chosen: dict[str, float] = {}
    for block, calls in _calls(model, ids).items():
        layers = [one for one in linear_layers(model).values() if one.block == block]
        module = model.get_submodule(block)
        before = [_hidden(module(*args, **kwargs)) for args, kwargs in calls]
        costs = [(_LEVELS * one.count).round().long() for one in layers]
        errors: list[Tensor] = []
        for one in layers:
            lost = [0.0 for _ in _LEVELS]
            for level, kept in enumerate(_LEVELS[:-1].tolist()):
                with skip(density={**whole, one.name: kept}):
                    after = [_hidden(module(*args, **kwargs)) for args, kwargs in calls]
                lost[level] = sum(
                    float((a - b).square().sum()) for a, b in zip(after, before, strict=True)
                )
            errors.append(torch.tensor(lost))
        given = {"errors": errors, "costs": costs}
        budget = int(density * sum(one.count for one in layers))
        levels = allocator.run(**{word: given[word] for word in allocator.evidence}, budget=budget)
        names = [one.name for one in layers]
        chosen |= dict(zip(names, _LEVELS[levels].tolist(), strict=True))
    return chosen


_Call = tuple[tuple[Any, ...], dict[str, Any]]


def _calls(model: nn.Module, ids: Tensor) -> dict[str, list[_Call]]:
    """What each block is given on a text, batch after batch."""
    calls: dict[str, list[_Call]] = {block: [] for block in blocks_of(model)}

    def keep(block: str, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        calls[block].append((args, given))

    handles = [
        model.get_submodule(block).register_forward_pre_hook(
            functools.partial(keep, block), with_kwargs=True
        )
        for block in calls
    ]
    for _ in answers(model, ids):
        pass
    for handle in handles:
        handle.remove()
    return calls


def _hidden(outcome: Any) -> Tensor:
    return outcome if isinstance(outcome, Tensor) else outcome[0]


def _frozen(
    model: Any, method: Method, density: float, wanted: Skipping, calibration: Tensor | None
) -> Frozen:
    if calibration is None:
        raise UserError(
            f"{method.id} goes by what blocks contribute to the answers to a text.",
            "Give a calibration text.",
        )
    group: Group = 0.5 if wanted.prompt is None else wanted.prompt
    scores = contributions(model, method, calibration, group)
    frozen = skip_blocks(model, method, method.run(scores, density=density, **wanted.options))
    frozen.group = group
    return frozen


def contributions(
    model: nn.Module, method: Method, ids: Int[Tensor, "windows length"], group: Group
) -> Float[Tensor, " blocks"]:
    """How far each block, frozen alone for a group of tokens, moves the answer at the last one.

    It is `measure/layer_contribution` of the last place, in nats.

    Args:
        model: A causal language model.
        method: What asks.
        ids: Windows of a text.
        group: The tokens.
    """
    contribution = catalogue.get("measure/layer_contribution")
    before = _last(model, ids)
    count = len(blocks_of(model))
    scores = torch.zeros(count)
    for number in range(count):
        frozen = skip_blocks(model, method, torch.arange(count) != number)
        frozen.group = group
        with frozen:
            after = _last(model, ids)
        scores[number] = contribution.run([before[:, None]], [after[:, None]], last=True)
    return scores


def _last(model: nn.Module, ids: Tensor) -> Float[Tensor, "windows vocabulary"]:
    """Logarithms of what the last token of each window foretells."""
    return torch.cat([part[:, -1].float().log_softmax(dim=-1) for part in answers(model, ids)])


class Judged:
    """What a sparse model answers, and what it saved in doing so.

    Args:
        sparse: The model.
        wanted: What it leaves out.
    """

    def __init__(self, sparse: Sparse, wanted: Skipping) -> None:
        self.sparse = sparse
        self.wanted = wanted
        self.whole = Tally()
        self.what = kind(sparse.method)

    def first(self, length: int) -> int:
        """Tokens of a window that are a prompt."""
        if "prompt" not in _SETTINGS[self.what]:
            return 0
        part = 0.5 if self.wanted.prompt is None else self.wanted.prompt
        # Answers are judged from the first token on after which none is of the group.
        found = int(part.nonzero().max()) + 1 if isinstance(part, Tensor) else int(part * length)
        if found > length - 2:
            raise UserError(
                f"a prompt of {found} tokens leaves nothing to judge in windows of {length}.",
                "Make it shorter.",
            )
        return found

    def dense(self, ids: Tensor) -> Iterator[Tensor]:
        """Logits of the model as it is, batch after batch."""
        for part in self._batches(ids):
            with self.sparse.dense(), self.whole.counting():
                logits = self._answer(part)
            yield logits

    def answers(self, ids: Tensor) -> Iterator[Tensor]:
        """Logits with work left out, in the same batches."""
        for part in self._batches(ids):
            with self.sparse.tally.counting():
                logits = self._answer(part)
            yield logits

    def asked(self, ask: Callable[[Tensor], Any], *, dense: bool) -> Callable[[Tensor], Any]:
        """What answers pictures, counted: with work left out, or as the model is."""

        def answer(pixels: Tensor) -> Any:
            if not dense:
                with torch.no_grad(), self.sparse.tally.counting():
                    return ask(pixels)
            with torch.no_grad(), self.sparse.dense(), self.whole.counting():
                return ask(pixels)

        return answer

    def savings(self, length: int = 0) -> Savings:
        """What was saved in all that, in windows of so many tokens."""
        tally, density = self.sparse.tally, self.wanted.density
        kept = tally.kept / max(tally.offered, 1)
        return Savings(
            method=self.sparse.method.id,
            density=kept if isinstance(density, Mapping) else density,
            kept=kept,
            flops_dense=self.whole.flops,
            flops=tally.needed,
            sparse_kernel=self.what == "activations",
            cache_dense=self.whole.cache,
            cache=tally.cache,
            after=self.first(length) if length else 0,
        )

    def _batches(self, ids: Tensor) -> Sequence[Tensor]:
        vocabulary = int(getattr(self.sparse.model.config, "vocab_size", 0))
        return ids.split(windows_at_once(ids.shape[1], vocabulary))

    def _answer(self, ids: Tensor) -> Tensor:
        model, prompt = self.sparse.model, self.first(ids.shape[1])
        if self.what != "keys":
            return torch.cat(list(answers(model, ids)))
        cache = self.sparse.cache()
        with torch.no_grad():
            parts = [
                model(part, past_key_values=cache, use_cache=True).logits
                for part in (ids[:, :prompt], ids[:, prompt:])
            ]
        if self.sparse.on:
            self.sparse.tally.cache += cache.held()
        else:
            self.whole.cache += cache.held()
        return torch.cat(parts, dim=1)
