"""What one kind of corruption changes in a network: signatures, small files that patch others.

A signature holds a difference for each tensor of some layers.  Opened beside a model it is that
model with the difference added, so that every merge of differences takes it as one of its models.
"""

import fnmatch
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.packing import pack, unpack
from layerwise.core.reading.checkpoint import Source, TensorInfo
from layerwise.core.reading.families import HEADS
from layerwise.core.reading.structure import block_of, embeds, natural
from layerwise.core.written import check_types, parse_json

State = Mapping[str, Tensor]
_KIND = "signature"
# What a file tells beside its tensors, in the order of `read_signature`.
_TOLD = {"bits": int, "ranges": Mapping[str, Sequence[Any]], "apart": Mapping[str, float]}
# Statistics of a batch norm, by which it is told from other norms.
_MEAN = "running_mean"
_LAST = (*HEADS, "fc", "linear", "head", "output")


@dataclass(frozen=True)
class Signature:
    """What is to be added to some tensors of a network.

    Attributes:
        label: What it is called: its file.
        tensors: Differences by name, float32.
        apart: By layer, the relative distance of the two models that it was taken from,
            |W_c - W| / |W|: it falls with depth, and layers beyond the fall are not worth keeping.
        bits: Width that the differences are rounded to; 0 where they are not.
    """

    label: str
    tensors: State
    apart: Mapping[str, float] = field(default_factory=dict[str, float])
    bits: int = 0

    @property
    def size(self) -> int:
        """Bytes that its differences take."""
        return sum(
            4 * one.numel() if not self.bits else 4 * math.ceil(one.numel() * self.bits / 32)
            for one in self.tensors.values()
        )

    def rounded(self, bits: int) -> "Signature":
        """The same with each tensor on 2^bits evenly spaced points from its least to its greatest.

        Raises:
            UserError: There are no codes so wide.
        """
        _check_bits(bits)
        made = {name: _decoded(*_coded(one, bits), bits) for name, one in self.tensors.items()}
        shaped = {name: one.reshape(self.tensors[name].shape) for name, one in made.items()}
        return Signature(self.label, shaped, self.apart, bits)

    def save(self, file: Path) -> None:
        """Write it as a safetensors file.

        Raises:
            UserError: The file is there already, or cannot be written.
        """
        if file.exists():
            raise UserError(f"{file} exists already.", "Give another name, or remove it.")
        stored: dict[str, Tensor] = {}
        ranges: dict[str, Any] = {}
        for name, one in self.tensors.items():
            if self.bits:
                codes, low, high = _coded(one, self.bits)
                stored[name] = pack(codes[None], self.bits)
                ranges[name] = [list(one.shape), low, high]
            else:
                stored[name] = one.contiguous()
        told = {"bits": self.bits, "ranges": ranges, "apart": dict(self.apart)}
        try:
            save_file(stored, file, {"layerwise": _KIND, _KIND: json.dumps(told)})
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be written: {error}", "Give another place.") from error


def is_signature(file: Path) -> bool:
    """Whether a path is a file of a signature."""
    if file.suffix != ".safetensors" or not file.is_file():
        return False
    try:
        with safe_open(file, framework="pt") as opened:
            return (opened.metadata() or {}).get("layerwise") == _KIND
    except (SafetensorError, OSError):  # whoever opens it as a model says so
        return False


def read_signature(file: Path) -> Signature:
    """Read the file of a signature.

    Raises:
        UserError: It is none.
    """
    if not is_signature(file):
        raise UserError(f"{file} is no signature.", "`layerwise signature` makes one.")
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            told = parse_json(opened.metadata()[_KIND])
            check_types(str(file), told, _TOLD)
            bits, ranges, apart = (told[name] for name in _TOLD)
            for name in opened.offset_keys():
                stored = opened.get_tensor(name)
                tensors[name] = _restored(stored, bits, ranges[name]) if bits else stored
    except (LookupError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{file} is damaged: {error!r}", "Take the signature again.") from error
    return Signature(str(file), tensors, apart, bits)


def _restored(stored: Tensor, bits: int, told: Sequence[Any]) -> Tensor:
    shape, low, high = told
    _check_bits(bits)
    # No more than is there, whatever shape is told.
    codes = unpack(stored, bits, min(math.prod(shape), 32 * stored.numel() // bits))[0]
    return _decoded(codes, float(low), float(high), bits).reshape(shape)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise UserError(f"{bits} bits are not possible.", "Give 1 to 16; 0 rounds nothing.")


def _coded(values: Tensor, bits: int) -> tuple[Tensor, float, float]:
    """Codes of a tensor, flat, and the least and the greatest of its values."""
    flat = values.reshape(-1)
    low, high = (float(flat.min()), float(flat.max())) if flat.numel() else (0.0, 0.0)
    if high == low:  # all alike: the first point is that value
        return torch.zeros_like(flat, dtype=torch.int32), low, high
    step = (high - low) / (2**bits - 1)
    return ((flat.double() - low) / step).round().to(torch.int32), low, high


def _decoded(codes: Tensor, low: float, high: float, bits: int) -> Tensor:
    return (low + codes.double() * ((high - low) / (2**bits - 1))).float()


def without(change: Float[Tensor, "..."], along: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A change less what of it lies along another one; all of it where the other is nothing.

    d - a <a, d> / <a, a>, of whole tensors.
    """
    wide = along.double()
    square = float(wide.square().sum())
    if not square:
        return change.clone()
    share = float((wide * change.double()).sum()) / square
    return (change.double() - share * wide).float()


def taken(name: str, start: State, clean: State, changed: State) -> Float[Tensor, "..."]:
    """What a signature holds for a tensor: that of a batch norm is the plain difference."""
    if is_of_batch_norm(name, start):
        return changed[name].float() - clean[name].float()
    ground = start[name].float()
    return without(changed[name].float() - ground, clean[name].float() - ground)


def is_of_batch_norm(name: str, names: Mapping[str, Any]) -> bool:
    """Whether a tensor belongs to a norm that keeps statistics."""
    return f"{name.rpartition('.')[0]}.{_MEAN}" in names


def depth_order(shapes: Mapping[str, Sequence[int]]) -> dict[str, list[str]]:
    """Tensors by the layer they are in, from the shallowest: blocks, and modules outside all.

    Only what holds a matrix or a filter is a layer, so that norms between layers are in none.
    Names say the order, their numbers read as numbers; embeddings come first and heads last.

    Args:
        shapes: Shape of every tensor by name.
    """
    modules: dict[str, list[str]] = {}
    for name in shapes:
        modules.setdefault(name.rpartition(".")[0] or name, []).append(name)
    found: dict[str, list[str]] = {}
    for module, names in modules.items():
        if any(len(shapes[name]) > 1 for name in names):
            found.setdefault(block_of(f"{module}.") or module, []).extend(names)

    def key(layer: str) -> tuple[int, Any]:
        word = layer.rpartition(".")[2]
        first = word not in HEADS and (embeds(word) or word in ("wte", "wpe"))
        return (0 if first else 2 if word in _LAST else 1, natural(layer))

    return {layer: found[layer] for layer in sorted(found, key=key)}


def kept_tensors(
    shapes: Mapping[str, Sequence[int]], layers: int = 0, pattern: str = ""
) -> list[str]:
    """The tensors that a signature holds: those of the first layers, and of all batch norms.

    Args:
        shapes: Shape of every tensor of floats by name.
        layers: How many layers, from the shallowest; 0 for half of them, rounded up.
        pattern: Which tensors instead, as in `conv1.*`.

    Raises:
        UserError: There are not so many, or the pattern matches nothing.
    """
    if pattern:
        chosen = fnmatch.filter(shapes, pattern.replace("[", "[[]"))
        if not chosen:
            raise UserError(
                f"{pattern} matches no tensor.", f"They have names such as {next(iter(shapes))}."
            )
        return chosen
    ordered = list(depth_order(shapes).values())
    if not 0 <= layers <= len(ordered):
        raise UserError(
            f"{layers} layers cannot be kept of {len(ordered)}.",
            "Give from 1 to that many, or 0 for half of them.",
        )
    count = layers or (len(ordered) + 1) // 2
    shallow = {name for names in ordered[:count] for name in names}
    return [name for name in shapes if name in shallow or is_of_batch_norm(name, shapes)]


@dataclass(frozen=True)
class Patched:
    """A model to whose tensors a signature is added as they are read."""

    model: Source
    signature: Signature

    def __post_init__(self) -> None:
        """Refuse a signature of another network.

        Raises:
            UserError: It names the tensor.
        """
        check_fits(self.signature, {n: one.shape for n, one in self.model.tensors.items()},
                   self.model.label)  # fmt: skip

    @property
    def label(self) -> str:
        """The signature's file."""
        return self.signature.label

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Those of the model."""
        return self.model.tensors

    @property
    def config(self) -> Mapping[str, Any]:
        """That of the model."""
        return self.model.config

    @property
    def companions(self) -> tuple[Path, ...]:
        """Those of the model."""
        return self.model.companions

    @property
    def size(self) -> int:
        """Bytes of the model's tensors."""
        return self.model.size

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or rows `start` to `stop` of it; float32 where something is added."""
        found = self.model.read(name, start, stop)
        change = self.signature.tensors.get(name)
        if change is None:
            return found
        return found.float() + (change[start:stop] if change.dim() else change)


def check_fits(signature: Signature, shapes: Mapping[str, Sequence[int]], label: str) -> None:
    """Refuse a signature whose tensors another network has not, or in other shapes.

    Raises:
        UserError: It names the tensor.
    """
    for name, one in signature.tensors.items():
        if name not in shapes or tuple(shapes[name]) != tuple(one.shape):
            there = f"has it as {tuple(shapes[name])}" if name in shapes else "has none such"
            raise UserError(
                f"{signature.label} changes {name} of shape {tuple(one.shape)}; {label} {there}.",
                "A signature patches networks of the architecture that it was taken from.",
            )
