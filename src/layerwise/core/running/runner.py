"""Run a model one block at a time, its weights read by name when their block comes.

The module tree is built without weights and never filled: each block is called with its
parameters as arguments.  Everything outside the blocks runs as the model's own forward, with the
blocks replaced by stand-ins, so no architecture is known here.
"""

import contextlib
import copy
import mmap
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from layerwise.core.economy import MICRO_BATCH_TOKENS, windows_at_once
from layerwise.core.errors import UserError
from layerwise.core.extras import need
from layerwise.core.learning import BlockAnswer
from layerwise.core.reading.checkpoint import ModuleSource, Source
from layerwise.core.reading.structure import Structure, block_of, structure
from layerwise.core.rewriting.rewriting import Rewritten, original, stands_for
from layerwise.core.running.carried import Activations, batches, filled
from layerwise.core.running.evidence import AttentionWatcher, Listener, UpdateCollector, Watcher
from layerwise.core.running.products import Answer, Answered, Attend, Follow, Listen, Tap

_Collecting = TypeVar("_Collecting", Watcher, Listener)


class _Stop(Exception):  # noqa: N818
    """The stand-in of the first block has what it wants."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a layer's matrix lies in the module tree: a parameter, and a part of it.

    Attributes:
        parameter: The parameter.
        expert: Which entry along its first axis; None for all of it.
        rows: Which rows of that are the layer's, where others lie beside them; None for all.
    """

    parameter: str
    expert: int | None = None
    rows: slice | None = None


@dataclass(frozen=True, slots=True)
class _Beside:
    """Listens to some of the outputs of a product."""

    listener: Listener
    outputs: slice

    def listening(self, inputs: Callable[[], Tensor]) -> Callable[[Tensor], None]:
        """What takes in the gradient of all outputs."""
        take = self.listener.listening(inputs)
        return lambda gradient: take(gradient[..., self.outputs])


class _StandIn(nn.Module):
    """Takes a block's place and does what it is told."""

    def __init__(self, act: Callable[..., Any]) -> None:
        super().__init__()
        self.act = act

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        return self.act(hidden, *args, **kwargs)


class Runner:
    """A model that runs from a `Source`, one block in memory at a time.

    It computes in float32, or what `start` is told.

    Args:
        source: Where weights come from.
        found: The source's structure.
        device: Where the block at work is put.
        trust_remote_code: Let the checkpoint bring its own Python.
        tokens: Tokens that are run at once; one window at least.

    Attributes:
        original: What runs the model as it was before it was rewritten; itself if it was not.

    Raises:
        UserError: The model cannot be built here; the message says what is missing.
    """

    original: "Runner"

    def __init__(
        self,
        source: Source,
        found: Structure,
        *,
        device: str = "cpu",
        trust_remote_code: bool = False,
        tokens: int = MICRO_BATCH_TOKENS,
    ) -> None:
        self.source = source
        self.tokens = tokens
        self._empty = False
        self.device = torch.device(device)
        self.model = _skeleton(source, trust_remote_code)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        self._names = _module_names(self.model, source)
        self._places = _places(self._names, found)
        if absent := [block for block in found.blocks if block and block not in self._names.blocks]:
            raise UserError(
                f"{source.label} has {', '.join(absent)}, but {type(self.model).__name__}, "
                "as which it is run, has nothing there.",
                "Use methods that read weights alone, with --proof none.",
            )
        parents = {self._module_path(b).rpartition(".")[0] for b in found.blocks if b}
        lists = all(isinstance(self.model.get_submodule(p), nn.ModuleList) for p in parents)
        apart = len(parents) == 1 and "" not in found.blocks and lists and bool(source.config)
        self.blocks = found.blocks if apart else [""]
        self._calls: dict[torch.dtype, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._wrap: Callable[[Tensor], Any] = lambda hidden: hidden
        self.original = self
        if isinstance(source, Rewritten):
            how: Any = {"trust_remote_code": trust_remote_code, "tokens": tokens}
            before = original(source)
            self.original = Runner(before, structure(before), device=device, **how)

    @property
    def whole(self) -> bool:
        """The model runs as one block."""
        return self.blocks == [""]

    def running(self, tokens: int) -> "Runner":
        """The same, with so many tokens run at once."""
        return self if tokens == self.tokens else self._other(tokens=tokens)

    def originals(self, block: str) -> list[str]:
        """Blocks of the original that lie after those before this one, up to the one it is made of.

        After the last, what is left of the original.
        """
        if self.whole:
            return [""]
        inside = self.original.blocks
        made_of = [inside.index(stands_for(self.source, one)) for one in self.blocks]
        place = self.blocks.index(block)
        first = made_of[place - 1] + 1 if place else 0
        last = len(inside) if block == self.blocks[-1] else made_of[place] + 1
        return inside[first:last]

    def blank(self) -> "Runner":
        """The same with weights of zeros, which take no memory: to see what running it takes."""
        return self._other(empty=True)

    def anew(self) -> "Runner":
        """The same as if it had run nothing: for windows of another length."""
        return self._other(anew=True)

    def _other(self, *, tokens: int = 0, empty: bool = False, anew: bool = False) -> "Runner":
        other = copy.copy(self)
        other.tokens = tokens or self.tokens
        other._empty = empty
        # What one learns of calls goes with how its first block answers.
        other._calls = {} if empty or anew else dict(self._calls)
        before = self.original
        how: Any = {"tokens": tokens, "empty": empty, "anew": anew}
        other.original = other if before is self else before._other(**how)
        return other

    def modules(self, block: str) -> dict[str, nn.Module]:
        """The modules of a block that hold whole tensors of the source, by their names there."""
        path = self._module_path(block)
        inside = f"{path}." if path else ""
        return {
            parts[0].rpartition(".")[0]: self.model.get_submodule(parameter.rpartition(".")[0])
            for parameter, parts in self._names.tensors.items()
            if len(parts) == 1 and parameter.startswith(inside)
        }

    def block_bytes(self, block: str) -> int:
        """What the parameters of a block take in float32."""
        path = f"{self._module_path(block)}." if block else ""
        return self._bytes(name for name in self._names.tensors if name.startswith(path))

    def outer_bytes(self) -> int:
        """What the parameters outside the blocks take in float32."""
        blocks = tuple(f"{self._module_path(block)}." for block in self.blocks)
        return self._bytes(name for name in self._names.tensors if not name.startswith(blocks))

    def _bytes(self, parameters: Iterable[str]) -> int:
        return sum(torch.float32.itemsize * self._names.shapes[name].numel() for name in parameters)

    def start(
        self,
        ids: Tensor,
        dtype: torch.dtype = torch.float32,
        changed: Mapping[str, Tensor] | None = None,
    ) -> Float[Tensor, "..."]:
        """What the first block sees of some windows: the embeddings run once, here.

        Args:
            ids: The windows.
            dtype: What is computed in, here and wherever these activations are carried.
            changed: Tensors of the source, by name, that are to be used instead.
        """
        return ids if self.whole else filled(self.starting(ids, dtype, changed), len(ids))

    def starting(
        self,
        ids: Tensor,
        dtype: torch.dtype = torch.float32,
        changed: Mapping[str, Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """The same, batch after batch."""
        if self.whole:
            yield from ids.split(self.batch(ids))
            return
        outer = self._parameters("", dtype, skip_blocks=True, changed=changed)
        if dtype not in self._calls:
            self._capture(outer, _cast(ids[:1], dtype), dtype)
        for batch in ids.split(self.batch(ids)):
            yield self._embedded(outer, _cast(batch, dtype))

    def _embedded(self, outer: dict[str, Tensor], ids: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def stop(hidden: Tensor, *_: Any, **__: Any) -> None:
            seen.append(hidden.cpu())
            raise _Stop

        stand_ins = self._stand_ins([stop] * len(self.blocks))
        with stand_ins, torch.no_grad(), contextlib.suppress(_Stop):
            self._call_model(outer, ids)
        return seen[0]

    def forward(
        self,
        block: str,
        hidden: Tensor,
        changed: Mapping[str, Tensor],
        collectors: Mapping[str, Watcher] | None = None,
        answers: Mapping[str, Answer] | None = None,
    ) -> Tensor:
        """Carry activations through a block.

        Args:
            block: One of `blocks`.
            hidden: What it sees, as `start` or the block before gave it.
            changed: Tensors of the source, by name, that are to be used instead.
            collectors: What is to see the inputs of layers, by the layer's name.
            answers: What is to answer instead of a product with its weight, by the layer's name.
        """
        return filled(self.carry(block, hidden, changed, collectors, answers), len(hidden))

    def carry(
        self,
        block: str,
        hidden: Activations,
        changed: Mapping[str, Tensor],
        collectors: Mapping[str, Watcher] | None = None,
        answers: Mapping[str, Answer] | None = None,
        attention: AttentionWatcher | None = None,
        updates: UpdateCollector | None = None,
    ) -> Iterator[Tensor]:
        """What `forward` gives, batch after batch: each is read when the one before is done.

        `attention` is shown what tokens of each batch attend to, `updates` all that is added to
        the residual stream.
        """
        dtype = hidden.dtype if block else torch.float32
        parameters = self._parameters(block, dtype, changed=changed)
        watched = self._watched(parameters, block, collectors or {})
        answering = self._answering(parameters, block, answers or {})
        module, args, kwargs = self._called(block, dtype)
        for batch in batches(hidden, self.batch(hidden)):
            entering = batch.to(self.device)
            if updates is not None:
                updates.begin(entering)
            with torch.no_grad(), _modes(answering, watched, attention, updates):
                outcome = functional_call(module, parameters, (entering, *args), kwargs)
            if updates is not None:
                updates.end(_first(outcome))
            # Yielded outside: a generator left half-way must not hold the caller's modes.
            yield _first(outcome).cpu()

    def block_answer(self, block: str, changed: Mapping[str, Tensor]) -> BlockAnswer:
        """What a block answers to a batch, as a function of some of its layers' weights.

        Args:
            block: One of `blocks`.
            changed: Tensors of the source, by name, that are to be used instead.

        Returns:
            A function of a batch of what the block sees, and of tensors of the source by name:
            those of layers, in the shape they have there.  It passes gradients on.
        """
        parameters = self._parameters(block, changed=changed)
        module, args, kwargs = self._called(block)
        path = self._module_path(block)
        inside = {
            parts[0]: parameter.removeprefix(f"{path}.")
            for parameter, parts in self._names.tensors.items()
            if len(parts) == 1
        }

        def answer(hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
            given = parameters | {inside[name]: value for name, value in weights.items()}
            return _first(functional_call(module, given, (hidden.to(self.device), *args), kwargs))

        return answer

    def alone(self) -> list[str]:
        """The tensors of the source that are parameters or statistics by themselves."""
        return [
            parts[0]
            for parts in self._names.tensors.values()
            if len(parts) == 1 and self.source.tensors[parts[0]].dtype.is_floating_point
        ]

    def backward(
        self,
        block: str,
        hidden: Activations,
        gradient: Tensor,
        collectors: Mapping[str, Listener],
    ) -> Tensor:
        """Carry a gradient through a block, from what it answers to what it sees.

        Args:
            block: One of `blocks`.
            hidden: What it sees.
            gradient: Of the loss, with respect to what it answers.
            collectors: What is to see the gradients of layers' outputs, by the layer's name.

        Returns:
            The gradient with respect to `hidden`; zeros where that holds token ids.
        """
        parameters = self._parameters(block)
        places = {name: self._places[name].rows for name in collectors}
        listening = {
            name: collectors[name] if rows is None else _Beside(collectors[name], rows)
            for name, rows in places.items()
        }
        watched = self._watched(parameters, block, listening)
        module, args, kwargs = self._called(block)
        if not hidden.dtype.is_floating_point:  # something must ask for gradients
            for name in collectors:
                parameters[self._inside(block, name)].requires_grad_()
        size = self.batch(hidden)

        def parts() -> Iterator[Tensor]:
            for batch, wanted in zip(batches(hidden, size), gradient.split(size), strict=True):
                with torch.enable_grad(), Listen(watched):
                    entering = batch.to(self.device, copy=True)
                    if entering.is_floating_point():
                        entering.requires_grad_()
                    answer = _first(functional_call(module, parameters, (entering, *args), kwargs))
                answer.backward(wanted.to(self.device))
                found = entering.grad
                yield torch.zeros(batch.shape) if found is None else found.cpu()

        return filled(parts(), len(hidden))

    def gradient(
        self, hidden: Activations, ids: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Gradient of a loss of logits and windows, with respect to what the last block gave."""
        outer = {} if self.whole else self._parameters("", skip_blocks=True)
        size = self.answering(ids)

        def parts() -> Iterator[Tensor]:
            for batch, tokens in zip(batches(hidden, size), ids.split(size), strict=True):
                leaving = batch.to(self.device, copy=True).requires_grad_()
                with torch.enable_grad():
                    answer = leaving if self.whole else self._ended(outer, leaving, tokens)
                    loss(answer, tokens).backward()
                assert leaving.grad is not None
                yield leaving.grad.cpu()

        return filled(parts(), len(hidden))

    def logits(
        self,
        hidden: Activations,
        ids: Tensor,
        changed: Mapping[str, Tensor],
        outer: dict[str, Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """What the model answers to windows whose activations came out of the last block.

        Args:
            hidden: The activations.
            ids: The windows.
            changed: Tensors of the source, by name, that are to be used instead.
            outer: What `outer` gave, if it is at hand.
        """
        if self.whole:
            yield from batches(hidden, self.batch(ids))
            return
        if outer is None:
            outer = self._parameters("", hidden.dtype, skip_blocks=True, changed=changed)
        size = self.answering(ids)
        for batch, tokens in zip(batches(hidden, size), ids.split(size), strict=True):
            # A generator that is left half-way must not hold the caller's grad mode: the answer
            # is yielded outside.
            with torch.no_grad():
                answer = self._ended(outer, batch.to(self.device), tokens).cpu()
            yield answer

    def _ended(self, outer: dict[str, Tensor], hidden: Tensor, ids: Tensor) -> Tensor:
        """What the model makes of activations that came out of the last block."""
        first = self._wrap(hidden)

        def give(*_: Any, **__: Any) -> Any:
            return first

        def pass_on(hidden: Tensor, *_: Any, **__: Any) -> Any:
            return self._wrap(hidden)

        with self._stand_ins([give, *[pass_on] * (len(self.blocks) - 1)]):
            return _first(self._call_model(outer, _cast(ids, hidden.dtype)))

    def outer(self) -> dict[str, Tensor]:
        """The parameters outside the blocks, to be used more than once."""
        return {} if self.whole else self._parameters("", skip_blocks=True)

    @property
    def vocabulary(self) -> int:
        """Entries of a token's logits; 0 if its configuration does not say."""
        return int(self.source.config.get("vocab_size") or 0)

    def differentiable(self, block: str) -> Callable[[Tensor, Mapping[str, Answer]], Tensor]:
        """What a block answers to a batch of what it sees, as its layers answer in other ways.

        Args:
            block: One of `blocks`, or "" for the whole model, which is then in memory at once.

        Returns:
            A function of the batch, and of what layers answer instead of a product with their
            weight, by name.  It passes gradients on.
        """
        parameters = self._parameters(block)
        module, args, kwargs = self._called(block)

        def answer(hidden: Tensor, answers: Mapping[str, Answer]) -> Tensor:
            with Answered(self._answering(parameters, block, answers)):
                if not block:
                    return _first(self._call_model(parameters, hidden))
                given = (hidden.to(self.device), *args)
                return _first(functional_call(module, parameters, given, kwargs))

        return answer

    def batch(self, windows: Activations) -> int:
        """Windows that are carried at once."""
        return 64 if self.whole else windows_at_once(windows.shape[1], tokens=self.tokens)

    def answering(self, ids: Tensor) -> int:
        """Windows whose logits are made at once."""
        if self.whole:
            return self.batch(ids)
        return windows_at_once(ids.shape[1], self.vocabulary, self.tokens)

    def _call_model(self, outer: dict[str, Tensor], ids: Tensor) -> Any:
        options = {"use_cache": False} if getattr(self.model, "can_generate", bool)() else {}
        return functional_call(self.model, outer, (ids.to(self.device),), options)

    def _capture(self, outer: dict[str, Tensor], ids: Tensor, dtype: torch.dtype) -> None:
        """Learn what each block is called with, from one window, and how the first one answers."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            if len(calls) == 1:
                module = self._block_module
                outcome = functional_call(
                    module, self._parameters(self.blocks[0], dtype), (hidden, *args), kwargs
                )
                if isinstance(outcome, tuple):
                    rest = outcome[1:]
                    self._wrap = lambda hidden: (hidden, *rest)
            return self._wrap(hidden)

        self._block_module = self.model.get_submodule(self._module_path(self.blocks[0]))
        with self._stand_ins([record] * len(self.blocks)), torch.no_grad():
            self._call_model(outer, ids)
        self._calls[dtype] = calls

    @contextlib.contextmanager
    def _stand_ins(self, acts: Sequence[Callable[..., Any]]) -> Generator[None]:
        parent = self.model.get_submodule(self._module_path(self.blocks[0]).rpartition(".")[0])
        assert isinstance(parent, nn.ModuleList)
        real = list(parent)
        try:
            for number, act in enumerate(acts):
                stand_in = _StandIn(act)
                # Some models look at attributes of their blocks before they call them.
                for name, value in vars(real[number]).items():
                    if not name.startswith("_") and name not in ("training", "act"):
                        setattr(stand_in, name, value)
                parent[number] = stand_in
            yield
        finally:
            for number, module in enumerate(real):
                parent[number] = module

    def _module_path(self, block: str) -> str:
        """A block's path in the module tree, which checkpoints may name otherwise."""
        return self._names.blocks[block] if block else ""

    def _parameters(
        self,
        block: str,
        dtype: torch.dtype = torch.float32,
        *,
        skip_blocks: bool = False,
        changed: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The parameters of a block by their names inside it, read and in `dtype`."""
        changed = changed or {}
        path = self._module_path(block)
        inside = f"{path}." if path else ""
        blocks = tuple(f"{self._module_path(b)}." for b in self.blocks)
        made: dict[str, Tensor] = {}
        for parameter, parts in self._names.tensors.items():
            if not parameter.startswith(inside) or (skip_blocks and parameter.startswith(blocks)):
                continue
            if self._empty:
                shape = self._names.shapes[parameter]
                made[parameter.removeprefix(inside)] = _untouched(shape).to(dtype)
                continue
            read = [changed[name] if name in changed else self.source.read(name) for name in parts]
            value = read[0] if len(read) == 1 else self._names.joined(parameter, read)
            if value.is_floating_point():
                value = value.to(dtype)
            made[parameter.removeprefix(inside)] = value.to(self.device)
        return made

    def _called(
        self, block: str, dtype: torch.dtype = torch.float32
    ) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """A block's module, and what it is called with after activations of this dtype."""
        module = self.model.get_submodule(self._module_path(block)) if block else self.model
        args, kwargs = self._calls[dtype][self.blocks.index(block)] if block else ((), {})
        return module, args, kwargs

    def _answering(
        self, parameters: Mapping[str, Tensor], block: str, answers: Mapping[str, Answer]
    ) -> dict[int, Answer]:
        """What weights answer, by where they lie in memory."""
        return {self._pointer(parameters, block, name): one for name, one in answers.items()}

    def _pointer(self, parameters: Mapping[str, Tensor], block: str, layer: str) -> int:
        """Where a layer's weight lies in memory."""
        value, expert = parameters[self._inside(block, layer)], self._places[layer].expert
        return (value if expert is None else value[expert]).data_ptr()

    def _watched(
        self, parameters: Mapping[str, Tensor], block: str, collectors: Mapping[str, _Collecting]
    ) -> dict[int, list[_Collecting]]:
        """Collectors by where the weights that they watch lie in memory."""
        watched: dict[int, list[_Collecting]] = {}
        for layer, collector in collectors.items():
            pointer = self._pointer(parameters, block, layer)
            watched.setdefault(pointer, []).append(collector)
        return watched

    def _inside(self, block: str, layer: str) -> str:
        """The name, inside its block, of the parameter that holds a layer."""
        path = self._module_path(block)
        return self._places[layer].parameter.removeprefix(f"{path}." if path else "")


@dataclass(frozen=True)
class _Names:
    """How the module tree's parameters and blocks are made of a source's."""

    tensors: Mapping[str, list[str]]
    shapes: Mapping[str, torch.Size]
    blocks: Mapping[str, str]

    def joined(self, parameter: str, parts: Sequence[Tensor]) -> Tensor:
        """A parameter that holds every expert, from tensors that hold one each."""
        return torch.cat([part.reshape(-1) for part in parts]).reshape(self.shapes[parameter])


def _skeleton(source: Source, trust_remote_code: bool) -> nn.Module:
    """The module tree, its buffers computed, its parameters without storage."""
    before = original(source)
    if isinstance(before, ModuleSource):
        return _hollow(before.module)
    if not source.config:
        raise UserError(
            f"{source.label} has no config.json beside it, so the model cannot be run.",
            "Give the model's directory, or use methods that read weights alone "
            "(`layerwise methods --needs nothing`) with --proof none.",
        )
    if source.config.get("is_encoder_decoder"):
        raise UserError(
            f"{source.label} has an encoder and a decoder; such models are not run.",
            "Use methods that read weights alone (`layerwise methods --needs nothing`).",
        )
    transformers = need("transformers", f"running {source.label}")
    architectures = source.config.get("architectures") or [""]
    known = getattr(transformers, architectures[0], None)
    folder = next(f.parent for f in source.companions if f.name == "config.json")
    if known is None and not trust_remote_code:
        raise UserError(
            f"{source.label} is a {architectures[0] or 'model of unknown class'}, which "
            "transformers does not have"
            + (": its code is remote." if "auto_map" in source.config else "."),
            "Read that code, then add --trust-remote-code; or use methods that read weights alone.",
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code and known is None
        )
        if isinstance(source, Rewritten) and source.all_settings:
            config = type(config).from_dict(dict(source.config))
        with _without_storage():
            if known is not None:
                model = known._from_config(config, dtype=torch.float32)
            else:
                model = transformers.AutoModelForCausalLM.from_config(
                    config, dtype=torch.float32, trust_remote_code=True
                )
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise UserError(
            f"transformers cannot build {source.label} from its config.json: {error}",
            "Update transformers, or download the model again.",
        ) from error
    return _prepared(model)


def _hollow(module: nn.Module) -> nn.Module:
    """A copy of a module in evaluation mode, its parameters without storage."""
    without: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        for parameter in module.parameters()
    }
    return _prepared(copy.deepcopy(module, without))


def _prepared(model: nn.Module) -> nn.Module:
    # Experts one after the other: what multiplies them all at once hides who reads what.
    getattr(model, "set_experts_implementation", bool)("eager")
    return model.eval()


@contextlib.contextmanager
def _without_storage() -> Generator[None]:
    """Register every new parameter on the meta device; buffers keep their values."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # One that is there already is being tied to a second name.
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _module_names(model: nn.Module, source: Source) -> _Names:
    """Find the tensors that make each parameter.

    Raises:
        UserError: A parameter has none.
    """
    persistent = model.state_dict(keep_vars=True)
    # Tied parameters are one; whichever name the source has gives it.
    first: dict[int, str] = {}
    canonical = {name: first.setdefault(id(value), name) for name, value in persistent.items()}
    rename = _renaming(model, source, persistent)
    found: dict[str, dict[tuple[int, ...], str]] = {}
    blocks: dict[str, str] = {}
    for name in source.tensors:
        renamed, order = rename(name)
        if renamed in canonical:
            found.setdefault(canonical[renamed], {}).setdefault(order, name)
            blocks[block_of(name)] = block_of(renamed)
    for name in dict(model.named_parameters()):
        if name not in found:
            raise UserError(
                f"{source.label} lacks the tensor {name} that its model needs.",
                "Download it again: the checkpoint is not whole, or of another kind than its "
                "config.json says.",
            )
    tensors = {name: [parts[order] for order in sorted(parts)] for name, parts in found.items()}
    for name, parts in tensors.items():
        given, wanted = source.tensors[parts[0]].shape, tuple(persistent[name].shape)
        if len(parts) == 1 and given != wanted:
            raise UserError(
                f"{source.label}: {parts[0]} is {given}, and config.json makes it {wanted}.",
                "The checkpoint and its config.json do not belong together: download both again.",
            )
    shapes = {name: persistent[name].shape for name in tensors}
    return _Names(tensors, shapes, blocks)


def _renaming(
    model: nn.Module, source: Source, persistent: Mapping[str, Tensor]
) -> Callable[[str], tuple[str, tuple[int, ...]]]:
    """What gives the parameter that a tensor belongs to, and where among its parts it stands.

    transformers knows how each architecture names on disk what it names otherwise in memory.
    """
    if isinstance(original(source), ModuleSource):
        return lambda name: (name, ())
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    known: list[Any] = get_model_conversion_mapping(cast("Any", model))
    renamings = [rule for rule in known if not isinstance(rule, WeightConverter)]
    converters = [rule for rule in known if isinstance(rule, WeightConverter)]
    places = {
        pattern: place
        for rule in converters
        if _stacks(rule.operations)
        for place, pattern in enumerate(rule.source_patterns)
    }
    prefix = cast("str", getattr(model, "base_model_prefix", ""))

    def rename(name: str) -> tuple[str, tuple[int, ...]]:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, dict(persistent))
        if pattern is None:
            return renamed, ()
        if pattern not in places:
            raise UserError(
                f"{source.label}: transformers makes {renamed} out of {name} by a rearrangement "
                "that layerwise does not follow.",
                "Use methods that read weights alone, with --proof none.",
            )
        return renamed, (*map(int, re.findall(r"\d+", name)), places[pattern])

    return rename


def _stacks(operations: Sequence[Any]) -> bool:
    """The operations stack experts, the rows of each expert's matrices on top of each other."""
    steps = [(type(step).__name__, step.dim) for step in operations if hasattr(step, "dim")]
    stacked, rows = ("MergeModulelist", 0), ("Concatenate", 1)
    return len(steps) == len(operations) and steps in ([stacked], [stacked, rows])


def _places(names: _Names, found: Structure) -> dict[str, _Place]:
    rows = {layer.tensor: layer.rows for layer in found.layers.values()}
    by_tensor: dict[str, _Place] = {}
    for parameter, parts in names.tensors.items():
        experts = names.shapes[parameter][0] if len(parts) > 1 else 1
        each = len(parts) // experts
        starts: dict[int, int] = {}
        for number, name in enumerate(parts):
            if len(parts) == 1:
                by_tensor[name] = _Place(parameter)
                continue
            expert = number // each
            start = starts.get(expert, 0)
            starts[expert] = start + rows.get(name, 0)
            beside = slice(start, starts[expert]) if each > 1 else None
            by_tensor[name] = _Place(parameter, expert, beside)
    return {
        layer.name: (
            _Place(by_tensor[layer.tensor].parameter, layer.expert)
            if layer.expert is not None
            else by_tensor[layer.tensor]
        )
        for layer in found.layers.values()
        if layer.tensor in by_tensor
    }


@contextlib.contextmanager
def _modes(
    answers: Mapping[int, Answer],
    watched: Mapping[int, Sequence[Watcher]],
    attention: AttentionWatcher | None,
    updates: UpdateCollector | None,
) -> Generator[None]:
    """Products watched and answered as is wished, where anything is."""
    with contextlib.ExitStack() as entered:
        if answers:
            entered.enter_context(Answered(answers))
        if watched:
            entered.enter_context(Tap(watched))
        if attention is not None:
            entered.enter_context(Attend(attention))
        if updates is not None:
            entered.enter_context(Follow(updates))
        yield


def _cast(given: Tensor, dtype: torch.dtype) -> Tensor:
    """Pictures as a model that computes in `dtype` takes them; token ids stay as they are."""
    return given.to(dtype) if given.is_floating_point() else given


def _untouched(shape: torch.Size) -> Tensor:
    """Zeros in pages of the system's that it makes only for those who write to them."""
    size = max(1, shape.numel()) * torch.float32.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.float32)[: shape.numel()].view(shape)


def _first(outcome: Any) -> Tensor:
    """The tensor that matters in whatever a model or block returns."""
    if hasattr(outcome, "logits"):
        return outcome.logits
    if isinstance(outcome, Tensor):
        return outcome
    return outcome[0]
