"""A loaded model that leaves work out while it runs.

What is left out is a method's to say; how is here, for each kind of work:

    activations   inputs of linear layers are zeroed, each layer's by its own mask.  The products
                  with them are still made: what is counted as saved is what a kernel that skips
                  them would not do
    attentions    tokens leave the model after a block, and nothing is computed for them again
    scores        blocks are frozen for a group of tokens: for those they compute keys and values,
                  which the others read, and nothing else
    keys          core/running/thinned.py, a cache
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from layerwise.core.catalogue import Method
from layerwise.core.errors import UserError
from layerwise.core.reading.checkpoint import module_source
from layerwise.core.reading.families import CACHES
from layerwise.core.reading.structure import Layer, Structure, by_input, structure
from layerwise.core.running.products import Answered, Asked, Question
from layerwise.core.running.tally import Tally

# A part of a text from its beginning, or which of its positions.
Group = float | Bool[Tensor, " length"]
# Layers that share an input are turned by one of these, the first there is.
_TURNING = ("key", "gate")


class Sparse:
    """A loaded model some of whose work is left out; it is the same object, with hooks on it.

    Args:
        model: The model.
        method: What says what is left out.

    Attributes:
        tally: What was left out since, and what was computed while it was counting.
        on: Whether it is left out now.
    """

    def __init__(self, model: Any, method: Method) -> None:
        self.model = model
        self.method = method
        self.tally = Tally()
        self.on = True
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> "Sparse":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Give the model back as it was."""
        while self._undo:
            self._undo.pop()()

    def cache(self) -> Any:
        """A cache of keys and values for one run of `generate`, as `past_key_values`.

        Raises:
            UserError: The method leaves out something else.
        """
        raise UserError(
            f"{self.method.id} makes no cache: it leaves work out of every run.",
            "Call the model, or its generate, as ever.",
        )

    @contextmanager
    def dense(self) -> Generator[Any]:
        """The model as it was, inside."""
        before, self.on = self.on, False
        try:
            yield self.model
        finally:
            self.on = before

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Have a hook see what a module is given."""
        self._undo.append(module.register_forward_pre_hook(hook).remove)

    def replace(self, module: nn.Module, make: Callable[[Callable[..., Any]], Any]) -> None:
        """Have a module answer in another way, made of how it does."""
        answer, own = module.forward, vars(module).get("forward")
        module.forward = functools.wraps(answer)(make(answer))
        undo = functools.partial(setattr, module, "forward", own)
        self._undo.append(undo if own else functools.partial(delattr, module, "forward"))


def found_in(model: nn.Module) -> Structure:
    """The structure of a loaded model.

    Raises:
        UserError: It has no layer, or is stored quantized.
    """
    return structure(module_source(model))


def skip_inputs(
    model: nn.Module,
    method: Method,
    density: float | Mapping[str, float],
    options: Mapping[str, Any],
    *,
    first: float = 0.0,
    orthogonal: bool = False,
) -> Sparse:
    """Have the linear layers inside a model's blocks skip some inputs of each token.

    With `orthogonal` the input of layers that read the same one is turned first by Q, whose columns
    are the right singular vectors of the weight of keys, or of the gate, among them:

        y = (W Q) (m * Q^T x)

    so that the columns of that weight are orthogonal; without a mask y is what it was.  What turns
    an input is one more product for it, and is counted.  WINA's paper turns the residual stream
    instead, into weights and shortcuts, and pays for as many products, one at each shortcut.

    Args:
        model: The model.
        method: What chooses inputs, by `activations` and `columns`.
        density: Fraction of inputs to keep, for all layers or for each by name.
        options: The method's own.
        first: This part of the positions of a text, from its beginning, skips nothing.
        orthogonal: Turn inputs, where keys or a gate read them.

    Returns:
        The model with hooks.

    Raises:
        UserError: The model has no linear layer inside a block, or a name is none of its layers.
    """
    layers = linear_layers(model)
    densities = _densities(density, layers)
    sparse = Sparse(model, method)
    for sharing in by_input(layers.values()).values():
        turn = _turn(model, sharing) if orthogonal else None
        for number, layer in enumerate(sharing):
            hook = _Masked(sparse, _weight(model, layer), densities[layer.name], options, first)
            if turn is not None:
                hook.turned_by(turn, counted=number == 0)
            sparse.before(model.get_submodule(layer.name), hook)
    return sparse


def linear_layers(model: nn.Module) -> dict[str, Layer]:
    """The layers of a model whose inputs can be skipped, by name.

    Raises:
        UserError: There is none.
    """
    layers = {name: one for name, one in found_in(model).layers.items() if _linear(one)}
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no linear layer inside a block.",
            "Give a model of blocks of nn.Linear, such as transformers loads.",
        )
    return layers


def _linear(layer: Layer) -> bool:
    """Whether a module of its own multiplies by the layer's weight, and is inside a block."""
    inside = bool(layer.block) and layer.expert is None and layer.layout != "convolution"
    return inside and layer.tensor == f"{layer.name}.weight"


def _weight(model: nn.Module, layer: Layer) -> Float[Tensor, "out in"]:
    return layer.matrix(model.get_parameter(layer.tensor).detach())


def _densities(
    density: float | Mapping[str, float], layers: Mapping[str, Layer]
) -> Mapping[str, float]:
    if not isinstance(density, Mapping):
        return dict.fromkeys(layers, density)
    if unknown := density.keys() ^ layers.keys():
        raise UserError(
            f"{sorted(unknown)[0]} has a density and is no layer, or the other way round.",
            f"Give one for each of the {len(layers)} layers, such as {next(iter(layers))}.",
        )
    return density


def _turn(model: nn.Module, layers: Sequence[Layer]) -> Float[Tensor, "in in"] | None:
    """The right singular vectors of what turns the input of these layers; None if nothing does."""
    chosen = next((one for role in _TURNING for one in layers if one.role == role), None)
    if chosen is None:
        return None
    return torch.linalg.svd(_weight(model, chosen).float(), full_matrices=True).Vh.T.contiguous()


class _Masked:
    """Zeroes what a layer is given where its method does not keep it."""

    def __init__(
        self,
        sparse: Sparse,
        weight: Float[Tensor, "out in"],
        density: float,
        options: Mapping[str, Any],
        first: float,
    ) -> None:
        self.sparse = sparse
        self.rows = weight.shape[0]
        self.columns = weight.float().norm(dim=0)  # (in,)
        self.given = {**options, "density": density}
        self.first = first
        self.turn: Tensor | None = None
        self.counted = True
        self._weight = weight

    def turned_by(self, turn: Float[Tensor, "in in"], *, counted: bool) -> None:
        """Choose among turned inputs; the first of the layers that share them pays for turning."""
        self.turn = turn
        self.counted = counted
        self.columns = (self._weight.float() @ turn).norm(dim=0)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """What the layer is given instead."""
        if not self.sparse.on:
            return None
        inputs: Tensor = args[0]
        if self.turn is None and self.given["density"] == 1:
            self.sparse.tally.masked(torch.ones(inputs.shape, dtype=torch.bool))
            return None
        flat = inputs.reshape(-1, inputs.shape[-1])  # (tokens, in)
        seen = flat if self.turn is None else flat.float() @ self.turn
        method, words = self.sparse.method, {"activations": seen, "columns": self.columns}
        kept = method.run(**{word: words[word] for word in method.evidence}, **self.given)
        if inputs.dim() == 3:  # (batch, length, in)
            dense = torch.arange(inputs.shape[1]) < int(self.first * inputs.shape[1])
            kept = kept | dense.to(kept.device).repeat(len(inputs))[:, None]
        self.sparse.tally.masked(kept, 2 * self.rows)
        masked = seen * kept
        if self.turn is not None:
            masked = (masked @ self.turn.T).to(inputs.dtype)
            # A kernel holds W Q and turns an input once; here it is turned back for each layer.
            self.sparse.tally.skipped += 2 * self.turn.numel() * len(flat) * (2 - self.counted)
        return (masked.reshape(inputs.shape), *args[1:])


def skip_tokens(
    model: nn.Module,
    method: Method,
    density: float,
    options: Mapping[str, Any],
    *,
    after: Sequence[int],
) -> Sparse:
    """Have tokens leave a model of pictures after some of its blocks.

    Args:
        model: The model; what follows its blocks reads tokens that always stay.
        method: What chooses tokens, by `attentions` and `keys` of the block.
        density: Fraction of the tokens to keep each time.
        options: The method's own.
        after: Numbers of the blocks.

    Returns:
        The model, changed in how it runs.

    Raises:
        UserError: A block is not there; as it runs: attention is computed in a way that cannot be
            seen, or is masked, as that of texts is.
    """
    blocks = blocks_of(model)
    if unknown := [number for number in after if number not in range(len(blocks))]:
        raise UserError(
            f"{type(model).__name__} has no block {unknown[0]}.",
            f"Choose among 0 to {len(blocks) - 1}.",
        )
    sparse = Sparse(model, method)

    def making(answer: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not sparse.on:
                return answer(hidden, *args, **kwargs)
            asked: list[Question] = []
            with Asked(asked.append):
                outcome = answer(hidden, *args, **kwargs)
            words = _attended(asked)
            kept = method.run(
                **{word: words[word] for word in method.evidence}, **options, density=density
            )
            sparse.tally.masked(kept)
            found = outcome if isinstance(outcome, Tensor) else outcome[0]
            left = found[kept].reshape(len(found), -1, found.shape[2])
            return left if isinstance(outcome, Tensor) else (left, *outcome[1:])

        return forward

    for number in sorted(set(after)):
        sparse.replace(model.get_submodule(blocks[number]), making)
    return sparse


def blocks_of(model: nn.Module) -> list[str]:
    """Names of a model's blocks, in order."""
    return [block for block in found_in(model).blocks if block]


def _attended(asked: Sequence[Question]) -> dict[str, Tensor]:
    """Queries, keys and attention of the one product of attention that was seen."""
    if len(asked) != 1 or asked[0].mask is not None or asked[0].causal:
        raise UserError(
            f"a block computed {len(asked)} attentions that could be seen, and one without "
            "a mask is needed.",
            "Use a model of pictures, loaded with attn_implementation='sdpa'.",
        )
    (seen,) = asked
    keys = seen.key.repeat_interleave(seen.query.shape[1] // seen.key.shape[1], dim=1)
    products = (seen.query @ keys.transpose(2, 3)).float() * seen.scale
    return {"queries": seen.query, "keys": seen.key, "attentions": products.softmax(dim=-1)}


def skip_blocks(model: nn.Module, method: Method, kept: Bool[Tensor, " blocks"]) -> "Frozen":
    """Have a model of texts freeze a group of tokens in the blocks that are not kept.

    Args:
        model: The model.
        method: What chose.
        kept: True where a block works on the group.

    Returns:
        The model, changed in how it runs; its `group` can be changed.

    Raises:
        UserError: It has another number of blocks; as it runs: a block takes no cache.
    """
    blocks = blocks_of(model)
    if len(kept) != len(blocks):
        raise UserError(
            f"{type(model).__name__} has {len(blocks)} blocks, and {len(kept)} are spoken of.",
            "Give one for each.",
        )
    frozen = Frozen(model, method)
    layers = found_in(model).layers.values()
    for number, (block, stays) in enumerate(zip(blocks, kept.tolist(), strict=True)):
        frozen.tally.masked(torch.tensor([stays]))
        if not stays:
            queries = [one for one in layers if one.block == block and one.role == "query"]
            weights = [model.get_parameter(one.tensor) for one in queries if _linear(one)]
            make = functools.partial(_FrozenBlock, frozen, number, weights)
            frozen.replace(model.get_submodule(block), make)
    return frozen


class Frozen(Sparse):
    """A model some of whose blocks leave a group of tokens as it is.

    Only what a model reads first is frozen: tokens that come when a cache holds others are not.

    Attributes:
        group: The tokens: a part of what is read, from its beginning, or which positions of it.
    """

    group: Group = 0.5

    def members(self, length: int) -> Bool[Tensor, " length"]:
        """True for positions of the group.

        Raises:
            UserError: The group is of a text of another length.
        """
        if not isinstance(self.group, Tensor):
            return torch.arange(length) < int(self.group * length)
        if self.group.shape != (length,):
            raise UserError(
                f"the group is of {tuple(self.group.shape)} positions, the text of {length}.",
                "Give one entry for each position.",
            )
        return self.group.cpu()


class _Stop(Exception):  # noqa: N818
    """Keys and values are there, and nothing else is wanted."""


class _FrozenBlock:
    """A block that works on some tokens only: they alone ask, and all are asked."""

    def __init__(
        self,
        frozen: Frozen,
        number: int,
        queries: Sequence[Tensor],
        answer: Callable[..., Any],
    ) -> None:
        self.frozen = frozen
        self.number = number
        self.queries = queries
        self.answer = answer
        self.names = list(inspect.signature(answer).parameters)
        self.cache = next((name for name in CACHES if name in self.names), CACHES[0])

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the block answers."""
        given = {**dict(zip(self.names[1:], args, strict=False)), **kwargs}
        past = given.get(self.cache)
        later = past is not None and past.get_seq_length(self.number) > 0
        if not self.frozen.on or later:
            return self.answer(hidden, *args, **kwargs)
        members = self.frozen.members(hidden.shape[1])
        if not bool(members.any()):
            return self.answer(hidden, *args, **kwargs)
        group, rest = (places.nonzero()[:, 0].to(hidden.device) for places in (members, ~members))
        caught = _Caught()
        zeros = {one.data_ptr(): _zeros(len(one)) for one in self.queries}
        with Answered(zeros), contextlib.suppress(_Stop):
            self.answer(hidden[:, group], **_cut(given, group, None), **{self.cache: caught})
        if caught.seen is None:
            raise UserError(
                f"block {self.number} keeps no keys in a cache, and so cannot be frozen.",
                "Use a causal language model of transformers.",
            )
        joined = _Joined(caught.seen, group, rest, past)
        mask = _rows(given.get("attention_mask"), rest, hidden)
        if len(rest):
            cut = _cut(given, rest, mask)
            outcome = self.answer(hidden[:, rest], **cut, **{self.cache: joined})
        else:
            joined.update(*(part[:, :, :0] for part in caught.seen), self.number)
            outcome = hidden[:, rest]
        found = outcome if isinstance(outcome, Tensor) else outcome[0]
        left = hidden.index_copy(1, rest, found.to(hidden.dtype))
        return left if isinstance(outcome, Tensor) else (left, *outcome[1:])


def _zeros(rows: int) -> Callable[[Tensor], Tensor]:
    return lambda inputs: inputs.new_zeros(1, rows).expand(len(inputs), rows)


class _Caught:
    """Stands in for a cache, and stops the block that fills it."""

    def __init__(self) -> None:
        self.seen: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> Any:
        """Take in keys and values, (batch, heads, tokens, size)."""
        self.seen = (keys, values)
        raise _Stop

    def get_seq_length(self, *_: Any) -> int:
        """Tokens that it holds."""
        return 0


class _Joined:
    """Stands in for a cache that holds the keys and values of some tokens among those to come."""

    def __init__(self, held: tuple[Tensor, Tensor], group: Tensor, rest: Tensor, past: Any) -> None:
        self.held = held
        self.order = torch.cat([group, rest]).argsort()
        self.past = past

    def update(self, keys: Tensor, values: Tensor, *where: Any, **how: Any) -> Any:
        """Keys and values of all tokens, in their order; the true cache takes them too."""
        together = [
            torch.cat([held, new], dim=2)[:, :, self.order]
            for held, new in zip(self.held, (keys, values), strict=True)
        ]
        return tuple(together) if self.past is None else self.past.update(*together, *where, **how)

    def get_seq_length(self, *_: Any) -> int:
        """Tokens that it holds, as far as the block should know."""
        return 0


def _rows(mask: Any, rest: Tensor, hidden: Tensor) -> Tensor:
    """What the tokens that ask may see: rows of a mask, (..., asking, length)."""
    if mask is None:
        length = torch.arange(hidden.shape[1], device=hidden.device)
        return (length[None, :] <= rest[:, None])[None, None]
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise UserError(
            "attention is masked in a way whose rows cannot be taken.",
            "Load the model with attn_implementation='sdpa'.",
        )
    return mask[:, :, rest]


def _cut(given: Mapping[str, Any], places: Tensor, mask: Any) -> dict[str, Any]:
    """What a block is given beside its tokens and a cache, for some of them alone."""
    made = {name: value for name, value in given.items() if name not in CACHES}
    made["attention_mask"] = mask
    for name in ("position_ids", "cache_position"):
        if isinstance(given.get(name), Tensor):
            made[name] = given[name][..., places]
    if (embeddings := given.get("position_embeddings")) is not None:
        made["position_embeddings"] = tuple(
            part.index_select(-2, places) for part in cast("Sequence[Tensor]", embeddings)
        )
    return made
