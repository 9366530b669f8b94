"""Which tensors are layers to work on, how they hang together, and what is left alone and why."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.reading.checkpoint import Source, TensorInfo
from layerwise.core.reading.families import (
    EMBEDDINGS,
    GENERIC,
    HEADS,
    ROLES,
    ROUTERS,
    Family,
    family,
)

Layout = Literal["linear", "conv1d", "convolution"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One matrix to work on.

    Attributes:
        name: The module's name; an expert inside a 3-D tensor has its number in brackets.
        tensor: Name of the tensor that holds it.
        expert: Index along the first axis of a 3-D tensor.
        rows: Outputs.
        width: Inputs; for a convolution the kernel's entries per output.
        layout: How the tensor lies against the (out, in) matrix.
        block: The block it belongs to, "" outside all of them.
        role: Its job in the block, from its name.
        reads: Layers with the same value read the same input.
        fused: Layers with the same value must have one bit width: servers fuse them.
        feeder: Module whose output the layers of `reads` alone read; "" if none.
    """

    name: str
    tensor: str
    expert: int | None
    rows: int
    width: int
    layout: Layout
    block: str
    role: str
    reads: str
    fused: str
    feeder: str

    @property
    def count(self) -> int:
        """Number of weights."""
        return self.rows * self.width

    def matrix(self, tensor: Tensor) -> Float[Tensor, "out in"]:
        """The layer's (out, in) matrix inside its tensor; a view."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        return tensor.T if self.layout == "conv1d" else tensor.reshape(self.rows, self.width)

    def read(
        self, source: Source, start: int = 0, stop: int | None = None
    ) -> Float[Tensor, "rows in"]:
        """Rows of the layer's matrix, of which no more is read than its layout asks for."""
        if self.layout == "conv1d":
            return self.matrix(source.read(self.tensor))[start:stop].contiguous()
        if self.expert is not None:
            return source.read(self.tensor, self.expert, self.expert + 1)[0][start:stop]
        return source.read(self.tensor, start, stop).flatten(1)

    def store(self, matrix: Float[Tensor, "out in"], shape: tuple[int, ...]) -> Tensor:
        """The matrix, or rows of it, as the tensor of `shape` lays them out (in one expert)."""
        if self.layout == "conv1d":
            return matrix.T.contiguous()
        return matrix.reshape(-1, *shape[1 if self.expert is None else 2 :])


@dataclass(frozen=True, slots=True)
class Structure:
    """A model's layers by name, in order, and the reason for every tensor left alone."""

    layers: Mapping[str, Layer]
    left: Mapping[str, str]
    family: Family

    @property
    def blocks(self) -> list[str]:
        """The names of the blocks, in order."""
        return list(dict.fromkeys(layer.block for layer in self.layers.values()))

    def items(self) -> list[list[Layer]]:
        """Layers that must share a level, together: what an allocator sees as one item."""
        grouped: dict[str, list[Layer]] = {}
        for layer in self.layers.values():
            grouped.setdefault(layer.fused, []).append(layer)
        return list(grouped.values())


def by_input(layers: Iterable[Layer]) -> dict[str, list[Layer]]:
    """Layers that read the same input, together, by `Layer.reads`."""
    grouped: dict[str, list[Layer]] = {}
    for layer in layers:
        grouped.setdefault(layer.reads, []).append(layer)
    return grouped


def structure(source: Source) -> Structure:
    """Find the layers of a model from its tensor names, shapes and `config.json`.

    A tensor is a layer when it is the floating-point matrix, convolution or stack of experts of a
    module, and not an embedding, a head or a router.  In a known family it must also lie inside a
    block.  Of an unknown one nothing else is assumed: no layers share an input, no norm feeds
    one, a head is what is called one, and a stack of experts is left, for its axes are not known.

    Raises:
        UserError: The model has no layer, or is stored quantized already.
    """
    if source.config.get("quantization_config"):
        raise UserError(
            f"{source.label} is quantized already (its config.json has a quantization_config).",
            "Give the original checkpoint it was made from.",
        )
    facts = family(source.config)
    layers: dict[str, Layer] = {}
    left: dict[str, str] = {}
    for info in source.tensors.values():
        if reason := _reason_to_leave(info, facts):
            left[info.name] = reason
        else:
            found = _layers(info, facts, source.tensors)
            layers |= {layer.name: layer for layer in found}
    if not layers:
        raise UserError(
            f"{source.label} has no layer to work on: none of its {len(left)} tensors is a "
            "matrix inside a block.",
            "Give the checkpoint of a whole model.",
        )
    order = sorted(layers.values(), key=lambda layer: (natural(layer.block), natural(layer.name)))
    return Structure({layer.name: layer for layer in order}, left, facts)


def _reason_to_leave(info: TensorInfo, facts: Family) -> str:
    """Why a tensor is no layer to work on; "" if it is one."""
    module = info.name.removesuffix(".weight")
    words = module.split(".")
    stacked = len(info.shape) == 3
    # An unknown model's `classifier` may hold many layers, `classifier.0` and on: none is left.
    heads = words[-1:] if facts is GENERIC else words
    rules = (
        (not info.dtype.is_floating_point, "holds integers"),
        (len(info.shape) < 2, "a vector (norm, bias or buffer)"),
        (not set(HEADS).isdisjoint(heads), "output head"),
        (any(embeds(word) for word in words), "embedding"),
        (f".{module}".endswith(ROUTERS), "router: chooses experts"),
        (stacked and "expert" not in module, "a 3-D tensor that is not experts"),
        (stacked and facts is GENERIC, "experts in one 3-D tensor, whose axes are not known"),
        (len(info.shape) > 4, f"a tensor with {len(info.shape)} axes"),
        (not stacked and not info.name.endswith("weight"), "not a module's weight (a buffer?)"),
        (info.dtype.itemsize < 2, "stored in 8 bits already"),
        (facts is not GENERIC and not block_of(module), "outside the blocks"),
    )
    return next((reason for applies, reason in rules if applies), "")


def embeds(word: str) -> bool:
    """Whether a word of a module's name says that it is an embedding."""
    return word in EMBEDDINGS or word.startswith("embed") or word.endswith(("embed", "embeddings"))


def _layers(info: TensorInfo, facts: Family, tensors: Mapping[str, TensorInfo]) -> list[Layer]:
    module = info.name.removesuffix(".weight")
    block = block_of(module)
    inside = module.removeprefix(f"{block}.")
    number = re.search(r"experts\.(\d+)\.", inside)
    pattern = inside.replace(number[0], "experts.{}.") if number else inside
    reads = next((r for r in facts.reads if pattern in r.layers), None)
    expert = number[1] if number else ""
    group = f"{block}.{reads.layers[0].format(expert)}" if reads else module
    feeder = f"{block}.{reads.feeder.format(expert)}" if reads and reads.feeder else ""
    # Parts of one model can differ: what feeds a text block may not exist in a vision block.
    feeder = feeder if f"{feeder}.weight" in tensors else ""
    fused = group if reads and pattern in reads.layers[: reads.fused] else module
    layout: Layout = "linear"
    if inside.endswith(facts.transposed) and facts.transposed:
        layout = "conv1d"
    elif len(info.shape) == 4:
        layout = "convolution"
    rows, width = info.shape[0], info.count // info.shape[0]
    if layout == "conv1d":
        rows, width = width, rows
    named = (role for end, role in ROLES.items() if f".{inside}".endswith(f".{end}"))
    role = next(named, "convolution" if layout == "convolution" else "linear")

    def made(name: str, index: int | None, group: str, fused: str) -> Layer:
        return Layer(name, info.name, index, rows, width, layout, block, role, group, fused, feeder)

    if len(info.shape) == 3:
        count, rows, width = info.shape
        names = [f"{module}[{index}]" for index in range(count)]
        return [made(name, index, name, name) for index, name in enumerate(names)]
    return [made(module, None, group, fused)]


def block_of(module: str) -> str:
    """The shortest part of a name that ends in a number, if anything follows it."""
    found = re.match(r"(.*?\.\d+)\.", module)
    return found[1] if found else ""


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key in which 10 comes after 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
