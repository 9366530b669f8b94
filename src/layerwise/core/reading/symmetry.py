"""What can be permuted in a network without changing its function, as data."""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.reading.checkpoint import Source, TensorInfo
from layerwise.core.reading.families import Stream, family
from layerwise.core.reading.structure import block_of


@dataclass(frozen=True)
class Symmetry:
    """Units that can change places if all that holds them is permuted alike.

    Attributes:
        name: Which units they are.
        axes: For each tensor that holds them, the axis along which they lie.
        size: Entries along that axis that belong to one unit, one after the other.
        sizes: Another number of entries for some of the tensors: query heads that share a key.
    """

    name: str
    axes: Mapping[str, int]
    size: int = 1
    sizes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def entries(self, tensor: str) -> int:
        """Entries of one unit along a tensor's axis."""
        return self.sizes.get(tensor, self.size)

    def units(self, state: Mapping[str, Tensor]) -> int:
        """How many units a network has."""
        tensor, axis = next(iter(self.axes.items()))
        return state[tensor].shape[axis] // self.entries(tensor)


def symmetries(source: Source) -> tuple[Symmetry, ...]:
    """What can be permuted in a model.

    In models whose residual stream is known: the stream, groups of heads that share a key, and the
    insides of gated MLPs.  Rotary embeddings tie the entries of a head to their places.  In
    residual networks of convolutions: the inside of each block, and the stream of each stage where
    every change of width is a convolution.  In a chain of linear layers: what lies between two.

    Raises:
        UserError: None of these is what it is.
    """
    names, stream = source.tensors, family(source.config).stream
    if stream is not None and f"{stream.embedding}.weight" in names:
        found = _transformer(source, stream)
    elif any(_CONVOLUTION.match(name) for name in names):
        found = _residual(names)
    else:
        found = _chain(names)
    if not found:
        raise UserError(
            f"{source.label} is no model whose symmetries are known.",
            "Models are Llama and its like, residual networks of convolutions, and chains of "
            "linear layers; merge others without permuting them.",
        )
    return tuple(found)


def _transformer(source: Source, stream: Stream) -> list[Symmetry]:
    names, config = source.tensors, source.config
    width = {f"{stream.embedding}.weight": 1, f"{stream.norm}.weight": 0}
    if f"{stream.head}.weight" in names:
        width[f"{stream.head}.weight"] = 1
    blocks = sorted({block_of(name) for name in names if block_of(name)})
    inner: list[Symmetry] = []
    for block in blocks:
        here = {name.removeprefix(f"{block}."): name for name in names if block_of(name) == block}
        if any("expert" in name for name in here):
            raise UserError(
                f"{source.label} has experts, whose order and insides are not permuted here.",
                "Merge it without permuting.",
            )
        for norm, layers in stream.reads:
            width |= {here[f"{norm}.weight"]: 0}
            width |= {here[f"{one}.weight"]: 1 for one in layers if f"{one}.weight" in here}
        for one in stream.writes:
            width |= {here[name]: 0 for name in (f"{one}.weight", f"{one}.bias") if name in here}
        inner += _heads(block, here, config, stream)
        if stream.gated and all(f"{one}.weight" in here for one in stream.gated):
            *ups, down = stream.gated
            axes = {here[f"{one}.weight"]: 0 for one in ups} | {here[f"{down}.weight"]: 1}
            axes |= {here[f"{one}.bias"]: 0 for one in ups if f"{one}.bias" in here}
            inner.append(Symmetry(f"{block} MLP", axes))
    return [Symmetry("residual stream", width), *inner]


def _heads(
    block: str, here: Mapping[str, str], config: Mapping[str, Any], stream: Stream
) -> list[Symmetry]:
    """Heads that share a key and a value change places together, with all their queries."""
    if not stream.values or not stream.queries:
        return []
    (value, output), (query, key) = stream.values, stream.queries
    heads = int(config["num_attention_heads"])
    shared = int(config.get("num_key_value_heads") or heads)
    size = int(config.get("head_dim") or config["hidden_size"] // heads)
    axes = {here[f"{one}.weight"]: 0 for one in (key, value, query)}
    axes |= {here[f"{one}.bias"]: 0 for one in (key, value, query) if f"{one}.bias" in here}
    axes[here[f"{output}.weight"]] = 1
    wide = {
        here[name]: size * heads // shared
        for name in (f"{query}.weight", f"{query}.bias", f"{output}.weight")
        if name in here
    }
    return [Symmetry(f"{block} heads", axes, size, wide)]


_CONVOLUTION = re.compile(r"(.*layer\d+\.\d+)\.conv(\d)\.weight$")
_NORMS = ("weight", "bias", "running_mean", "running_var")


def _residual(names: Mapping[str, TensorInfo]) -> list[Symmetry]:
    blocks: dict[str, list[int]] = {}
    for name in names:
        if found := _CONVOLUTION.match(name):
            blocks.setdefault(found[1], []).append(int(found[2]))

    def norm(module: str) -> dict[str, int]:
        return {f"{module}.{one}": 0 for one in _NORMS if f"{module}.{one}" in names}

    inner: list[Symmetry] = []
    streams = [{"conv1.weight": 0, **norm("bn1")}]
    whole = True
    for block, numbers in blocks.items():
        *before, last = sorted(numbers)
        for number in before:
            axes = {f"{block}.conv{number}.weight": 0, **norm(f"{block}.bn{number}")}
            inner.append(
                Symmetry(f"{block} inside {number}", axes | {f"{block}.conv{number + 1}.weight": 1})
            )
        streams[-1][f"{block}.conv1.weight"] = 1
        shortcut = next(
            (one for one in ("downsample", "shortcut") if f"{block}.{one}.0.weight" in names), ""
        )
        if shortcut:
            streams[-1][f"{block}.{shortcut}.0.weight"] = 1
            streams.append({f"{block}.{shortcut}.0.weight": 0, **norm(f"{block}.{shortcut}.1")})
        channels = names[f"{block}.conv{last}.weight"].shape[0]
        whole = whole and channels == names[next(iter(streams[-1]))].shape[0]
        streams[-1] |= {f"{block}.conv{last}.weight": 0, **norm(f"{block}.bn{last}")}
    heads = [name for name in ("fc.weight", "linear.weight") if name in names]
    if not whole or not heads or "conv1.weight" not in names:
        return inner
    streams[-1][heads[0]] = 1
    # A shortcut reads one stream and begins another, along different axes of one tensor.
    return [*(Symmetry(f"stream {n}", one) for n, one in enumerate(streams)), *inner]


def _chain(names: Mapping[str, TensorInfo]) -> list[Symmetry]:
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    shapes = {one: names.get(f"{one}.weight") for one in modules}
    if any(info is None or len(info.shape) != 2 for info in shapes.values()):
        return []
    known = {f"{one}.{kind}" for one in modules for kind in ("weight", "bias")}
    found: list[Symmetry] = []
    for first, second in itertools.pairwise(modules):
        before, after = names[f"{first}.weight"], names[f"{second}.weight"]
        if before.shape[0] != after.shape[1] or not names.keys() <= known:
            return []
        axes = {f"{first}.weight": 0, f"{second}.weight": 1}
        found.append(
            Symmetry(first, axes | ({f"{first}.bias": 0} if f"{first}.bias" in names else {}))
        )
    return found
