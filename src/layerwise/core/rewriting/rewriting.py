"""Rewrite a model into another before anything else is done with it.

Nothing is carried out at once: a `Rewritten` source gives every tensor as it has become when it is
read, by name and in slices.  What makes a model smaller is in narrowing.py.  Here it stays the same
function but is easier to quantize, by a change of basis that what follows undoes, or a factor that
what follows divides by.

With x a row vector of the residual stream, Q orthogonal and W of shape (out, in):

- gains: RMSNorm(x) * g, read by W           =  RMSNorm(x), read by W diag(g)
- stream: RMSNorm(x Q) = RMSNorm(x) Q, so all that reads x Q as W Q, and adds y Q as Q^T W
- values: attention mixes tokens within a head, so W_v may give v R where W_o reads W_o R
- keys: a rotary embedding turns each pair (j, j + d/2) of a head, and commutes with a factor that
  both share: k / m there is undone by q m
"""

import functools
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.packing import raw_bytes
from layerwise.core.reading.checkpoint import ModuleSource, Source, TensorInfo
from layerwise.core.reading.families import FAMILIES, Stream, family
from layerwise.core.reading.structure import Structure, block_of
from layerwise.core.rewriting.rotation import Rotation, rotation

Rotate = Literal["none", "hadamard", "orthogonal"]
Axis = Literal["rows", "columns"]
Widths = Literal["shared", "own"]

# A pair of keys that calibration never saw larger than this is dead: it is scaled as if it were.
DEAD = 1e-6


@dataclass(frozen=True, slots=True)
class Rewriting:
    """What is rewritten before anything else is done, in this order: blocks, units, then bases.

    Attributes:
        rotate: The orthogonal matrix that turns the residual stream, and the values of each head.
        seed: What is random in it.
        scale_keys: Even out the pairs of keys that rotary embeddings turn.
        drop_blocks: How many blocks go.
        drop_by: The measure of blocks by which the least important go.
        narrow: The method that says which units go; "" if none do.
        keep: Fraction of the weights of all layers that stays when units go.
        widths: Whether all blocks keep as many units, as a configuration has it, so that files get
            smaller; or each its own number, and units that go are zeros.
    """

    rotate: Rotate = "none"
    seed: int = 0
    scale_keys: bool = False
    drop_blocks: int = 0
    drop_by: str = "lim"
    narrow: str = ""
    keep: float = 1.0
    widths: Widths = "shared"

    @property
    def nothing(self) -> bool:
        """Whether bases stay as they are."""
        return self.rotate == "none" and not self.scale_keys

    @property
    def removes(self) -> bool:
        """Whether blocks or units go."""
        return bool(self.drop_blocks or self.narrow)


@dataclass(frozen=True)
class Scale:
    """Multiply the entries of an axis by a vector."""

    axis: Axis
    by: Float[Tensor, " entries"]

    @property
    def together(self) -> int:
        """Rows that must be at hand for one of them."""
        return 1

    def on(self, rows: Tensor, start: int) -> Tensor:
        """Some rows of a matrix, or entries of a vector, from `start` on."""
        if self.axis == "columns":
            return rows * self.by
        part = self.by[start : start + len(rows)]
        return rows * part.reshape(-1, *[1] * (rows.dim() - 1))


@dataclass(frozen=True)
class Turn:
    """Turn an axis by an orthogonal matrix, in as many pieces as it is longer than that."""

    axis: Axis
    by: Rotation

    @property
    def together(self) -> int:
        """Rows that must be at hand for one of them."""
        return self.by.size if self.axis == "rows" else 1

    def on(self, rows: Tensor, start: int) -> Tensor:
        """Some rows of a matrix, or entries of a vector: whole pieces."""
        if self.axis == "columns" or rows.dim() == 1:
            return self.by.apply(rows)
        return self.by.apply(rows.T).T


@dataclass(frozen=True)
class Take:
    """Leave out all columns but some: of a convolution, the channels that it reads."""

    kept: Int[Tensor, " kept"]

    @property
    def together(self) -> int:
        """Rows that must be at hand for one of them."""
        return 1

    def on(self, rows: Tensor, start: int) -> Tensor:
        """Some rows of a matrix."""
        return rows.index_select(1, self.kept)


@dataclass(frozen=True)
class Erase:
    """Zero some entries of an axis; the columns of a convolution are the channels it reads."""

    axis: Axis
    gone: Bool[Tensor, " entries"]

    @property
    def together(self) -> int:
        """Rows that must be at hand for one of them."""
        return 1

    def on(self, rows: Tensor, start: int) -> Tensor:
        """Some rows of a matrix, or entries of a vector, from `start` on."""
        along = 0 if self.axis == "rows" else 1
        part = self.gone if along else self.gone[start : start + len(rows)]
        others = [1] * rows.dim()
        others[along] = -1
        return rows.masked_fill(part.reshape(others), 0.0)


@dataclass(frozen=True)
class Change:
    """What becomes of a tensor.

    Attributes:
        steps: What is done to it, in order.
        of: The tensor it is made of; "" for the one of its own name.
        fill: What it holds before them, or all its entries do, whatever they held.
        offset: Is added before the steps and taken away after them.
        rows: Which of its rows stay, ascending; None for all.
    """

    steps: Sequence[Scale | Turn | Take | Erase] = ()
    of: str = ""
    fill: float | Tensor | None = None
    offset: float = 0.0
    rows: Int[Tensor, " kept"] | None = None

    @property
    def together(self) -> int:
        """Rows that are made together."""
        return math.lcm(*(step.together for step in self.steps))


Changes = Mapping[str, Change]


@dataclass(frozen=True)
class Rewritten:
    """A source whose tensors have become others.

    Attributes:
        base: The model as it was before; it may be rewritten itself.
        changes: What becomes of tensors, by name; others stay.
        added: Tensors that `base` has none of the name of, or one of another shape.
        settings: Entries of `config.json` that are others now.
        told: Digest of what was done: the same of one model means the same tensors.
        notes: What was done, for the reader of a report.
        left: Tensors of `base` that are no more.
        blocks: Blocks of `base`, by the names that they have now; empty if all are as they were.
    """

    base: Source
    changes: Changes
    added: Sequence[TensorInfo]
    settings: Mapping[str, Any]
    told: str
    notes: Sequence[str]
    left: frozenset[str] = frozenset()
    blocks: Mapping[str, str] = field(default_factory=dict[str, str])
    # A tensor whose rows are made together, until the last of them is read.
    _held: dict[str, Tensor] = field(default_factory=dict[str, Tensor], init=False, repr=False)

    @property
    def label(self) -> str:
        """The model's own."""
        return self.base.label

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Those of the model, then what was added."""
        return self._tensors

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's, with the settings that changed."""
        return {**self.base.config, **self.settings}

    @property
    def all_settings(self) -> Mapping[str, Any]:
        """Entries of `config.json` that are others than in the files."""
        before = self.base.all_settings if isinstance(self.base, Rewritten) else {}
        return {**before, **self.settings}

    @functools.cached_property
    def _tensors(self) -> Mapping[str, TensorInfo]:
        stay = {name: info for name, info in self.base.tensors.items() if name not in self.left}
        return {**stay, **{info.name: info for info in self.added}}

    @property
    def companions(self) -> tuple[Path, ...]:
        """The model's; its `config.json` is not `config`."""
        return self.base.companions

    @property
    def size(self) -> int:
        """Bytes of the model's own files, which results are compared with."""
        return self.base.size

    @property
    def making(self) -> int:
        """Bytes that making a tensor takes at most: as it was, turned, and as it is stored."""
        whole = (self.tensors[name] for name, one in self.changes.items() if one.together > 1)
        most = 3 * torch.float32.itemsize * max((info.count for info in whole), default=0)
        return most + (self.base.making if isinstance(self.base, Rewritten) else 0)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor as it has become, or rows of it, in the dtype that it is stored in."""
        change, info = self.changes.get(name), self.tensors[name]
        if change is None:
            return self.base.read(name, start, stop)
        rows, together = info.shape[0], change.together
        stop = rows if stop is None else min(stop, rows)
        if together < rows or stop - start == rows:
            return self._made(name, change, start, stop)
        whole = self._held.get(name)
        if whole is None:
            self._held.clear()
            whole = self._held[name] = self._made(name, change, 0, rows)
        if stop == rows:
            self._held.clear()
        return whole[start:stop].clone()

    def _made(self, name: str, change: Change, start: int, stop: int) -> Tensor:
        together = change.together
        first, last = start // together * together, -(-stop // together) * together
        if isinstance(change.fill, Tensor):
            made = change.fill[first:last]
        elif change.fill is not None:
            made = torch.full(self.tensors[name].shape, change.fill)[first:last]
        elif change.rows is not None:
            rows = change.rows[first:last]
            begin, end = int(rows[0]), int(rows[-1]) + 1
            made = self.base.read(change.of or name, begin, end)[rows - begin]
        else:
            made = self.base.read(change.of or name, first, last)
        made = made.to(torch.promote_types(made.dtype, torch.float32))
        made = made + change.offset if change.offset else made
        for step in change.steps:
            made = step.on(made, first)
        made = made[start - first : stop - first]
        made = made - change.offset if change.offset else made
        return made.to(self.tensors[name].dtype).contiguous()


def notes_of(source: Source) -> Sequence[str]:
    """What a model was rewritten into, for the reader of a report."""
    return [note for one in _rewritten(source) for note in one.notes]


def told_of(source: Source) -> str:
    """Digests of all that was done to a model."""
    return " ".join(one.told for one in _rewritten(source))


def original(source: Source) -> Source:
    """The model as it was before it was rewritten."""
    return next((one.base for one in _rewritten(source)), source)


def stands_for(source: Source, block: str) -> str:
    """The block of the original that one was made of."""
    for one in reversed(_rewritten(source)):
        block = one.blocks.get(block, block)
    return block


def _rewritten(source: Source) -> list[Rewritten]:
    """What a source has become, the first rewriting first."""
    made: list[Rewritten] = []
    while isinstance(source, Rewritten):
        made.insert(0, source)
        source = source.base
    return made


def rewrite(
    source: Source, asked: Rewriting, peaks: Mapping[str, Float[Tensor, "heads half"]] | None = None
) -> Source:
    """The model under a rewriting.

    Args:
        source: The model.
        asked: What to do.
        peaks: For `scale_keys`, what those of `pair_peaks` saw.

    Raises:
        UserError: Its structure is not one that can be rewritten.
    """
    if asked.nothing:
        return source
    stream = stream_of(source, asked)
    made: list[Changes] = []
    notes: list[str] = []
    added: list[TensorInfo] = []
    settings: dict[str, Any] = {}
    if asked.rotate != "none":
        width = int(source.tensors[f"{stream.embedding}.weight"].shape[1])
        turning = rotation(asked.rotate, width, asked.seed)
        made += [gains_folded(source, stream), stream_turned(source, stream, turning)]
        notes.append(f"the residual stream was turned by {_told(asked, turning)}")
        if stream.values:
            heads = rotation(asked.rotate, head_size(source), asked.seed)
            made.append(values_turned(source, stream, heads))
            notes.append(f"values were turned, head by head, by {_told(asked, heads)}")
        settings["tie_word_embeddings"] = False
        if (head := f"{stream.head}.weight") not in source.tensors:
            info = source.tensors[f"{stream.embedding}.weight"]
            added.append(TensorInfo(head, info.dtype, info.shape))
            notes.append(
                f"the embeddings were tied to the head; turned, the head is a tensor of its own, "
                f"which adds {info.size / 1e6:.3g} MB"
            )
    if asked.scale_keys:
        assert peaks is not None
        made.append(keys_scaled(source, stream, peaks))
        notes.append("keys were scaled before their rotary embedding, and queries by the inverse")
    digest = hashlib.sha256(repr(asked).encode())
    for seen in (peaks or {}).values():
        digest.update(raw_bytes(seen))
    return Rewritten(source, combined(made), added, settings, digest.hexdigest(), notes)


def combined(parts: Iterable[Changes]) -> Changes:
    """One rewrite after the other."""
    made: dict[str, Change] = {}
    for changes in parts:
        for name, change in changes.items():
            before = made.get(name, Change())
            assert before.offset == change.offset or not before.steps
            steps = (*before.steps, *change.steps)
            fill = before.fill if change.fill is None else change.fill
            made[name] = Change(steps, before.of or change.of, fill, change.offset)
    return made


def stream_of(source: Source, asked: Rewriting) -> Stream:
    """What is known of a model's residual stream, after a look at each of its tensors.

    Raises:
        UserError: It is of another kind, lies in memory, or has a tensor that is not accounted for.
    """
    what = "--rotate" if asked.rotate != "none" else "--scale-keys"
    stream = family(source.config).stream
    if isinstance(source, ModuleSource):
        raise UserError(
            f"{source.label} is in memory, and {what} rewrites checkpoints.",
            "Save it (model.save_pretrained(DIR)) and give DIR.",
        )
    if stream is None:
        known = [kind for one in FAMILIES if one.stream is not None for kind in one.types]
        kind = source.config.get("model_type") or "model of unknown type"
        raise UserError(
            f"{source.label} is a {kind}, of which no rewriting is known that leaves its function "
            f"as it was: {what} cannot be used.",
            f"Leave {what} out; it works on {', '.join(known)}.",
        )
    named = _accounted(stream)
    for info in source.tensors.values():
        if _pattern(info.name) not in named or len(info.shape) > 2:
            raise UserError(
                f"{source.label} has the tensor {info.name} {info.shape}, and it is not known "
                f"whether that reads the residual stream: {what} cannot be used.",
                f"Leave {what} out.",
            )
    for name in (f"{stream.embedding}.weight", f"{stream.norm}.weight"):
        if name not in source.tensors:
            raise UserError(
                f"{source.label} has no tensor {name}, so {what} cannot be used.",
                "Give the checkpoint of a whole model.",
            )
    if asked.scale_keys and not stream.queries:
        raise UserError(
            f"{source.label} makes queries and keys in one layer: --scale-keys cannot be used.",
            "Leave --scale-keys out.",
        )
    return stream


def gains_folded(source: Source, stream: Stream) -> Changes:
    """Norms without gains: the layers that read them multiply by these instead."""
    made: dict[str, Change] = {}
    for norm, layers in _norms(source, stream):
        name = f"{norm}.weight"
        gain = source.read(name).float() + _offset(source)
        made[name] = Change(fill=1.0 - _offset(source))
        made |= {layer: Change([Scale("columns", gain)], of) for layer, of in layers.items()}
    return made


def stream_turned(source: Source, stream: Stream, turning: Rotation) -> Changes:
    """All that reads, adds to, begins or ends the residual stream does so in another basis.

    It takes norms without gains: see `gains_folded`.
    """
    columns, rows = Change([Turn("columns", turning)]), Change([Turn("rows", turning)])
    made: dict[str, Change] = {f"{stream.embedding}.weight": columns}
    for _, layers in _norms(source, stream):
        made |= dict.fromkeys(layers, columns)
    for name in source.tensors:
        if _module(_pattern(name)) in stream.writes:
            made[name] = rows
    return made


def values_turned(source: Source, stream: Stream, turning: Rotation) -> Changes:
    """Values in another basis of each head, in which the layer after them reads."""
    value, reader = stream.values
    made: dict[str, Change] = {}
    for name in source.tensors:
        module = _module(_pattern(name))
        if module == value:
            made[name] = Change([Turn("rows", turning)])
        elif module == reader and name.endswith(".weight"):
            made[name] = Change([Turn("columns", turning)])
    return made


def inputs_scaled(
    source: Source, found: Structure, feeder: str, scale: Float[Tensor, " in"]
) -> Changes:
    """A norm's or layer's outputs divided by `scale`, where only layers read them that undo it.

    That is every norm of the stream and the layer whose outputs a gate multiplies: W_up's rows are
    divided, W_down's columns multiplied.

    Args:
        source: The model.
        found: Its structure, which says what `feeder` feeds.
        feeder: Name of the module.
        scale: One factor for each input of the layers that it feeds.
    """
    norm = len(source.tensors[f"{feeder}.weight"].shape) == 1
    made: dict[str, Change] = {}
    for kind, offset in (("weight", _offset(source) if norm else 0.0), ("bias", 0.0)):
        if (name := f"{feeder}.{kind}") in source.tensors:
            made[name] = Change([Scale("rows", 1 / scale)], offset=offset)
    fed = [layer for layer in found.layers.values() if layer.feeder == feeder]
    return made | {layer.tensor: Change([Scale("columns", scale)]) for layer in fed}


def keys_scaled(
    source: Source,
    stream: Stream,
    peaks: Mapping[str, Float[Tensor, "heads half"]],
    alpha: float = 1.0,
) -> Changes:
    """Keys whose rotary pairs are all of one size, and queries multiplied by what they lost.

    With m_{h,j} the largest norm of the pair (j, j + d/2) of key head h over all tokens, before the
    rotary embedding (FireQ, 2025, 2505.20839, step "pre-RoPE"):

        k_{h,j}, k_{h,j+d/2}  *=  alpha / m_{h,j}
        q_{g,j}, q_{g,j+d/2}  *=  m_{h,j} / alpha     for each query head g that reads key head h

    Both members share the factor, so it commutes with the rotation: the products stay.  Where
    queries and keys are normed head by head, a factor on their layer would be divided out again; it
    goes into the weights of those norms, which heads share, with m_j the largest over heads.

    Args:
        source: The model.
        stream: Its residual stream.
        peaks: m by the name of the layer that makes keys; below `DEAD` it counts as `DEAD`.
        alpha: What every pair's largest norm becomes.
    """
    made: dict[str, Change] = {}
    for key, seen in peaks.items():
        block = block_of(key)
        sides = {"query": 1, "key": -1}
        modules = dict(zip(sides, stream.queries, strict=True))
        norms = dict(zip(sides, stream.query_norms, strict=True))
        normed = f"{block}.{norms['key']}.weight" in source.tensors
        size = seen.max(dim=0, keepdim=True).values if normed else seen
        factor = size.clamp_min(DEAD).repeat(1, 2) / alpha  # (heads, head entries)
        for side, power in sides.items():
            module = f"{block}.{norms[side] if normed else modules[side]}"
            names = [n for n in (f"{module}.weight", f"{module}.bias") if n in source.tensors]
            for name in names:
                each = source.tensors[name].shape[0] // factor.numel()
                by = factor.repeat_interleave(each, dim=0).flatten() ** power
                offset = _offset(source) if normed else 0.0
                made[name] = Change([Scale("rows", by)], offset=offset)
    return made


class PairPeaks:
    """Sees the inputs of a layer that makes keys, and keeps the largest norm of each rotary pair.

    Args:
        weight: The layer's, (heads * size, in).
        bias: The layer's; None if it has none.
        norm: What multiplies keys that are normed head by head; None where they are not.
        size: Entries of a head.
        epsilon: Of that norm.
    """

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        norm: Float[Tensor, " size"] | None,
        size: int,
        epsilon: float,
    ) -> None:
        self.weight, self.bias, self.norm = weight, bias, norm
        self.epsilon = epsilon
        self.peaks = torch.zeros(len(weight) // size, size // 2)

    def see(self, inputs: Float[Tensor, "tokens in"]) -> None:
        """Take in some tokens."""
        keys = torch.nn.functional.linear(inputs.cpu().float(), self.weight, self.bias)
        keys = keys.unflatten(1, (len(self.peaks), -1))  # (tokens, heads, size)
        if self.norm is not None:
            mean = keys.square().mean(dim=-1, keepdim=True)
            keys = keys * (mean + self.epsilon).rsqrt() * self.norm
        first, second = keys.chunk(2, dim=-1)
        found = torch.hypot(first, second).amax(dim=0)  # (heads, half)
        self.peaks = torch.maximum(self.peaks, found)


def pair_peaks(source: Source, key: str) -> PairPeaks:
    """What is to see the inputs of the layer that makes keys, by its name.

    Raises:
        UserError: The model's rotary embedding turns other pairs.
    """
    config = source.config
    told = (config.get("rope_parameters") or {}, config)
    if any(one.get("partial_rotary_factor", 1.0) != 1.0 for one in told):
        raise UserError(
            f"{source.label} turns a part of each key only, and --scale-keys takes all of it.",
            "Leave --scale-keys out.",
        )
    stream = family(source.config).stream
    assert stream is not None
    names = (f"{key}.weight", f"{key}.bias", f"{block_of(key)}.{stream.query_norms[1]}.weight")
    weight, bias, norm = (
        source.read(name).float() if name in source.tensors else None for name in names
    )
    assert weight is not None
    gain = None if norm is None else norm + _offset(source)
    epsilon = float(config.get("rms_norm_eps", 1e-6))
    return PairPeaks(weight, bias, gain, head_size(source), epsilon)


def head_size(source: Source) -> int:
    """Entries of an attention head."""
    config = source.config
    given = config.get("head_dim")
    return int(given or config["hidden_size"] // config["num_attention_heads"])


def _offset(source: Source) -> float:
    return family(source.config).norm_offset


def _norms(source: Source, stream: Stream) -> list[tuple[str, dict[str, str]]]:
    """Each norm of the stream, and the weights that read it, with what else they are made of."""
    readers = {norm: set(layers) for norm, layers in stream.reads}
    found: dict[str, dict[str, str]] = {}
    for name in source.tensors:
        block, pattern = block_of(name), _module(_pattern(name))
        if not block or not name.endswith(".weight"):
            continue
        for norm, layers in readers.items():
            if pattern in layers:
                found.setdefault(f"{block}.{norm}", {})[name] = ""
    head = f"{stream.head}.weight"
    tied = "" if head in source.tensors else f"{stream.embedding}.weight"
    return [*found.items(), (stream.norm, {head: tied})]


def _accounted(stream: Stream) -> frozenset[str]:
    """The names, inside their blocks, of all tensors whose part in the stream is known."""
    layers = [one for _, readers in stream.reads for one in readers]
    inside = {*layers, *stream.writes, *(norm for norm, _ in stream.reads), *stream.query_norms}
    kinds = {f"{module}.{kind}" for module in inside for kind in ("weight", "bias")}
    outside = {f"{one}.weight" for one in (stream.embedding, stream.norm, stream.head)}
    return frozenset({*kinds, *outside, *stream.beside})


def _pattern(name: str) -> str:
    """A tensor's name inside its block, an expert's number left open."""
    inside = name.removeprefix(f"{block_of(name)}.")
    return re.sub(r"experts\.\d+\.", "experts.{}.", inside)


def _module(pattern: str) -> str:
    return pattern.rpartition(".")[0]


def _told(asked: Rewriting, turning: Rotation) -> str:
    sizes = " x ".join(str(len(factor)) for factor in turning.factors)
    kind = "Hadamard" if asked.rotate == "hadamard" else "orthogonal"
    return f"a random {kind} matrix of {turning.size} ({sizes}, seed {asked.seed})"
