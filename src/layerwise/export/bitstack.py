"""Blocks that are loaded one after another: one set of files for every size of a model.

Plain safetensors.  Each block of each layer is a group of tensors of its own, and `stack.json`
says in which order they are worth loading.  `layerwise.load` makes a model of as many as a budget
has room for; a `Stack` keeps them packed, and adds and drops blocks while the model is in use.
"""

import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from layerwise.core import catalogue
from layerwise.core.economy import memory_limit
from layerwise.core.errors import UserError
from layerwise.core.format import Format, Trial
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.reading.checkpoint import Checkpoint, TensorInfo
from layerwise.core.reading.structure import Layer, Structure
from layerwise.core.running.apply import Transformed
from layerwise.core.running.products import located
from layerwise.core.written import fits, parse_json

NAME = "bitstack"
METHOD = "bitstack"
ORDER = "stack.json"
VERSION = 1
# A block's tensors are called LAYER.blocks.NUMBER.PART.
_BLOCKS, _PLACES = "blocks", 3


@dataclass(frozen=True)
class BitStack(Format):
    """The blocks of a layer apart from each other, and the order that all of them are loaded in.

    Attributes:
        limit: Most bytes of tensors that are read; None is all there are.
    """

    limit: int | None = None
    # A loader that does not know the format finds no weights, instead of loading noise.
    stem = NAME
    codes = frozenset[catalogue.Codes]({"own"})
    unpacking = 24.0
    tries = True

    def check(self, plan: Plan, found: Structure) -> None:
        """Refuse codes that are no blocks, and blocks that are not a linear layer's alone."""
        for name, layer_plan in plan.layers.items():
            layer = found.layers[name]
            if not layer_plan.coded:
                continue
            refused = (
                (layer_plan.method != METHOD, f"codes of {layer_plan.method}"),
                (layer_plan.rank > 0, "a low-rank correction"),
                (layer.expert is not None, "experts in one 3-D tensor"),
                (layer.layout == "convolution", "a convolution"),
            )
            for wrong, what in refused:
                if wrong:
                    raise UserError(
                        f"{NAME} cannot hold {name}: {what}.",
                        f"Give it --method {METHOD} and no rank, leave it as it is (`{name}: {{}}`)"
                        ", or write --format layerwise.",
                    )

    def tensors(self, layer: Layer, plan: LayerPlan, info: TensorInfo) -> list[TensorInfo]:
        """See docs/format.md."""
        if not plan.coded:
            return [info]
        layout = plan.layout(layer, self.options)
        return [
            TensorInfo(_named(layer.name, number, part), dtype, shape[1:])
            for number in range(int(plan.bits or 0))
            for part, (dtype, shape) in layout.items()
        ]

    def encode(self, done: Transformed, info: TensorInfo) -> dict[str, Tensor]:
        """A layer as those tensors."""
        if not done.plan.coded or done.quantized is None:
            return {
                info.name: done.layer.store(_in_full(done).to(info.dtype), (-1, *info.shape[1:]))
            }
        parts = done.quantized.parts(done.plan.told(self.options))
        return {
            _named(done.layer.name, number, part): block
            for part, blocks in parts.items()
            for number, block in enumerate(blocks)
        }

    def restored(self, done: Transformed, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The sum of all blocks, or the stored matrix."""
        if not done.plan.coded or done.quantized is None:
            return _in_full(done).to(dtype).float()
        return done.quantized.grid_values()

    def config(self, plan: Plan, found: Structure) -> Mapping[str, Any]:
        """What `read` needs."""
        layers = {
            name: {
                "tensor": found.layers[name].tensor,
                "shape": [found.layers[name].rows, found.layers[name].width],
                "transposed": found.layers[name].layout == "conv1d",
                "blocks": layer.bits,
            }
            for name, layer in plan.layers.items()
            if layer.coded
        }
        return {"quantization_config": {"quant_method": NAME, "version": VERSION, "layers": layers}}

    def finished(self, trial: Trial | None) -> Mapping[str, bytes]:
        """The order of the blocks, and the bytes that are held after each."""
        order = list(self._in_turn()) if trial is None else self._by_loss(trial)
        held = [self.least]
        for name in order:
            held.append(held[-1] + self.block_bytes(name))
        return {ORDER: (json.dumps({"order": order, "bytes": held}) + "\n").encode()}

    def within(self, budget: int) -> "BitStack":
        """The same, of which no more is read than that.

        Raises:
            UserError: One block of each layer, and what is in no block, is more.
        """
        self.blocks_within(budget)
        return replace(self, limit=budget)

    def read(self) -> Mapping[str, Tensor]:
        """Every tensor under the original's name; those of layers in float32.

        Raises:
            UserError: The files are of a later version.
        """
        self._check_version()
        source, state = self.source, dict[str, Tensor]()
        for name in self._whole:
            state[name] = source.read(name)
        for name, blocks in self.blocks_within(self.limit).items():
            state[self.layers[name]["tensor"]] = self.weight(name, blocks)
        return state

    @property
    def layers(self) -> Mapping[str, Mapping[str, Any]]:
        """Tensor, shape and blocks of each layer in the files, by name."""
        return self.source.config["quantization_config"]["layers"]

    @property
    def least(self) -> int:
        """Bytes of one block of each layer and of all that is in no block."""
        whole = sum(self.source.tensors[name].size for name in self._whole)
        return whole + sum(self.block_bytes(name) for name in self.layers)

    def block_bytes(self, name: str) -> int:
        """Bytes of a block of a layer, which are the same for all of them."""
        return sum(info.size for info in self._blocks[name][0].values())

    def block(self, name: str, number: int) -> Mapping[str, Tensor]:
        """A block of a layer, by the names of its parts."""
        return {
            part: self.source.read(info.name) for part, info in self._blocks[name][number].items()
        }

    def weight(self, name: str, blocks: int) -> Tensor:
        """What the first blocks of a layer stand for, as it lies in the model, float32."""
        facts = self.layers[name]
        matrix = decoded([self.block(name, number) for number in range(blocks)], facts)
        return matrix.T.contiguous() if facts["transposed"] else matrix

    def order(self) -> Sequence[str]:
        """The layers that get one more block, one after another."""
        source = self.source
        assert isinstance(source, Checkpoint)
        file = source.folder / ORDER
        if not file.exists():
            raise UserError(f"{source.label} lacks its {ORDER}.", "Copy that file again.")
        try:
            order = parse_json(file.read_text())["order"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} cannot be read: {error!r}", "Copy it again.") from error
        expected = list(self._in_turn())
        if not fits(order, Sequence[str]) or sorted(order) != sorted(expected):
            raise UserError(
                f"{file} does not list the blocks that the files hold.", "Copy both again."
            )
        return order

    def blocks_within(self, budget: int | None) -> dict[str, int]:
        """How many blocks of each layer there is room for: a prefix of the order.

        Raises:
            UserError: There is no room for one of each.
        """
        if budget is None:
            return {name: int(facts["blocks"]) for name, facts in self.layers.items()}
        held = self.least
        if budget < held:
            raise UserError(
                f"{budget} bytes have no room for one block of each layer of {self.source.label}.",
                f"Give {held} bytes or more ({held}B).",
            )
        blocks = dict.fromkeys(self.layers, 1)
        for name in self.order():
            held += self.block_bytes(name)
            if held > budget:
                break
            blocks[name] += 1
        return blocks

    def _in_turn(self) -> Iterator[str]:
        """Layers as they lie, level after level: one gets its next block when all have the last."""
        most = max((int(facts["blocks"]) for facts in self.layers.values()), default=0)
        for level in range(1, most):
            yield from (name for name, facts in self.layers.items() if facts["blocks"] > level)

    def _by_loss(self, trial: Trial) -> list[str]:
        """The same levels; within one, layers whose next block leaves the least loss come first.

        Every layer of the model that is tried has t blocks, and one of them t + 1.
        """
        order: list[str] = []
        given = dict.fromkeys(self.layers, 0)
        most = max((int(facts["blocks"]) for facts in self.layers.values()), default=0)
        for level in range(1, most):
            for name, facts in self.layers.items():
                if given[name] < (blocks := min(level, int(facts["blocks"]))):
                    self._put(trial, name, blocks)
                    given[name] = blocks
            losses: dict[str, float] = {}
            for name, facts in self.layers.items():
                if facts["blocks"] > level:
                    self._put(trial, name, level + 1)
                    loss = trial.loss()
                    losses[name] = math.inf if math.isnan(loss) else loss
                    self._put(trial, name, level)
            order += sorted(losses, key=losses.__getitem__)
        return order

    def _put(self, trial: Trial, name: str, blocks: int) -> None:
        trial.put(self.layers[name]["tensor"], self.weight(name, blocks))

    @functools.cached_property
    def _blocks(self) -> Mapping[str, Sequence[Mapping[str, TensorInfo]]]:
        """What the files say of each block's tensors, by layer, number and part."""
        made: dict[str, list[dict[str, TensorInfo]]] = {
            name: [{} for _ in range(facts["blocks"])] for name, facts in self.layers.items()
        }
        for info in self.source.tensors.values():
            layer, *place = info.name.rsplit(".", 3)
            if layer in made and len(place) == _PLACES and place[0] == _BLOCKS:
                made[layer][int(place[1])][place[2]] = info
        return made

    @property
    def _whole(self) -> list[str]:
        """Tensors that are in no block."""
        blocks = itertools.chain.from_iterable(self._blocks.values())
        inside = {info.name for block in blocks for info in block.values()}
        return [name for name in self.source.tensors if name not in inside]

    def _check_version(self) -> None:
        version = self.source.config["quantization_config"]["version"]
        if version > VERSION:
            raise UserError(
                f"{self.source.label} is of version {version} of the format; this layerwise reads "
                f"up to {VERSION}.",
                "pip install --upgrade layerwise.",
            )


class Packed(nn.Module):
    """A linear layer whose weight is the sum of the blocks that are there.

    Args:
        bias: Its bias.
        dtype: What its weight is computed with.
        facts: What the files say of it.
    """

    def __init__(self, bias: Tensor | None, dtype: torch.dtype, facts: Mapping[str, Any]) -> None:
        super().__init__()
        self.bias = bias
        self.dtype = dtype
        self.facts = facts
        # No buffers: what casts a model must not cast what its weights are made from.
        self.blocks: list[Mapping[str, Tensor]] = []

    @property
    def weight(self) -> Tensor:
        """The weight in full, as it lies in the model; made anew each time."""
        matrix = decoded(self.blocks, self.facts).to(self.dtype)
        return matrix.T if self.facts["transposed"] else matrix

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layer answers."""
        matrix = decoded(self.blocks, self.facts).to(inputs.device, inputs.dtype)
        return functional.linear(inputs, matrix, self.bias)


class Stack:
    """A model whose layers stay packed, and can have more or fewer blocks at any time.

    Args:
        model: What was loaded of the files; its layers are replaced by packed ones.
        files: The files, with the limit that the model has at first.

    Attributes:
        model: The model.
        files: Where blocks come from.
        blocks: How many each layer has.
    """

    def __init__(self, model: nn.Module, files: BitStack) -> None:
        self.model = model
        self.files = files
        self.blocks = dict.fromkeys(files.layers, 0)
        self._packed: dict[str, Packed] = {}
        for name, facts in files.layers.items():
            parent, _, last = located(model, name).rpartition(".")
            holder = model.get_submodule(parent)
            module: Any = getattr(holder, last)
            packed = Packed(module.bias, module.weight.dtype, facts)
            setattr(holder, last, packed)
            self._packed[name] = packed
        self._settle(files.blocks_within(files.limit))

    @property
    def bytes(self) -> int:
        """Bytes of the stored tensors that are held: all blocks, and what is in none."""
        size = self.files.block_bytes
        return self.files.least + sum((n - 1) * size(name) for name, n in self.blocks.items())

    def resize(self, budget: int | str) -> None:
        """Read or drop blocks until the largest prefix of the order is held that has room.

        Args:
            budget: Most bytes of stored tensors, as a number or as "12MiB".

        Raises:
            UserError: One block of each layer has no room; nothing was changed.
        """
        most = memory_limit(budget) if isinstance(budget, str) else budget
        self._settle(self.files.blocks_within(most))

    def _settle(self, wanted: Mapping[str, int]) -> None:
        # Dropped before others are read, so that no budget is passed on the way.
        for name, blocks in wanted.items():
            del self._packed[name].blocks[blocks:]
        for name, blocks in wanted.items():
            held = self._packed[name].blocks
            held += [self.files.block(name, number) for number in range(len(held), blocks)]
            self.blocks[name] = blocks


def decoded(
    blocks: Sequence[Mapping[str, Tensor]], facts: Mapping[str, Any]
) -> Float[Tensor, "out in"]:
    """The sum of some blocks of a layer, float32."""
    stores = catalogue.get(f"quantize/{METHOD}").stores
    parts = {part: torch.stack([block[part] for block in blocks]) for part in blocks[0]}
    rows, width = facts["shape"]
    return stores.read(parts, rows, width, {"bits": len(blocks)}).grid_values()


def _in_full(done: Transformed) -> Float[Tensor, "out in"]:
    """The weight that multiplies the input after its scales went into the feeder."""
    return done.weight if done.input_scale is None else done.weight * done.input_scale


def _named(layer: str, number: int, part: str) -> str:
    """The name of a part of a block."""
    return f"{layer}.{_BLOCKS}.{number}.{part}"
