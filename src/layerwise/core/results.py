"""What methods return: small frozen dataclasses of named tensors."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Integer, Shaped
from torch import Tensor
from torch.nn import functional

from layerwise.core.activation import Activation
from layerwise.core.packing import pack, unpack, words

# What a scale is stored as, whatever the weight's dtype: it has the range of float32, so no layer
# overflows it, and an output's layout is known before its weights are read.
SCALE_DTYPE = torch.bfloat16
SCALE_BITS = 8 * SCALE_DTYPE.itemsize
# What codes that are 8-bit floats are the bit patterns of: E4M3, whose largest value is 448.
FLOAT8_DTYPE = torch.float8_e4m3fn

# Inputs of 8 bits whose products with codes of 9 (a code less its zero point) sum to below 2^24.
_EXACT = 2**24 // (128 * 255)
_CACHED = 1 << 16  # entries

# What a measure answers: a number, or several by name, of which the first is its score.
Score = float | Mapping[str, float]

# The tensors that codes are stored as, by name: dtype and shape.
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def record(answer: Score) -> dict[str, float]:
    """What a measure answered, by name; a bare number has the name ""."""
    if not isinstance(answer, Mapping):
        return {"": float(answer)}
    return {name: float(value) for name, value in answer.items()}


class Coded(ABC):
    """A weight as codes, whatever those stand for.

    A quantizer whose codes are no `Quantized` brings a class of its own, frozen, that says how
    they are stored: the layout must be known before any weight is read.

    Attributes:
        bits: Width of one code.
        input_scale: The codes stand for the weight times this, column by column; whatever
            feeds the layer must be divided by it.  None is all ones.
        activation: How the layer's input is rounded when the model runs; None leaves it.
        notes: What the method had to do that its caller should know, for the report.
    """

    bits: int
    input_scale: Float[Tensor, " in"] | None
    activation: Activation | None
    notes: tuple[str, ...]

    @classmethod
    @abstractmethod
    def layout(cls, rows: int, width: int, told: Mapping[str, Any]) -> Layout:
        """The tensors that a layer's codes are stored as.

        Args:
            rows: Outputs of the layer.
            width: Its inputs.
            told: Every option of the quantizer, those at their defaults included; a group of 0
                is the whole row.  `codes` is what the quantizer says its codes stand for.
        """

    @classmethod
    def taken(cls, rows: int, width: int, told: Mapping[str, Any]) -> int:
        """Bytes of all that, but for what only fills up words."""
        layout = cls.layout(rows, width, told)
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())

    @abstractmethod
    def parts(self, told: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those tensors."""

    @classmethod
    @abstractmethod
    def read(
        cls, parts: Mapping[str, Tensor], rows: int, width: int, told: Mapping[str, Any]
    ) -> "Coded":
        """What `parts` gave, but for notes, scales that were folded and activations."""

    @abstractmethod
    def grid_values(self) -> Float[Tensor, "out in"]:
        """The stored matrix, float32: what the codes stand for before `input_scale` is undone."""

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The weight these codes stand for, float32."""
        values = self.grid_values()
        return values if self.input_scale is None else values / self.input_scale

    @abstractmethod
    def bits_per_weight(self) -> float:
        """Everything stored, per weight."""

    def with_activation(self, activation: Activation) -> "Coded":
        """The same, with its layer's input rounded when the model runs."""
        changed: Coded = replace(cast("Any", self), activation=activation)
        return changed

    def answer(self, inputs: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        """What the layer answers when it runs: inputs are rounded first, if they are to be.

        `inputs` are what the layer sees after `input_scale` went into its feeder.
        """
        rounded = inputs if self.activation is None else self.activation.rounded(inputs)
        return rounded @ self.grid_values().to(inputs.device).T


@dataclass(frozen=True, slots=True)
class Outliers:
    """Entries of a matrix that are kept beside its codes, row after row.

    Attributes:
        counts: How many there are in each row.
        columns: The input of each, ascending within a row.
        values: Each entry, in SCALE_DTYPE.
    """

    counts: Integer[Tensor, " out"]
    columns: Integer[Tensor, " entries"]
    values: Float[Tensor, " entries"]

    @classmethod
    def of(cls, mask: Bool[Tensor, "out in"], weight: Float[Tensor, "out in"]) -> "Outliers":
        """The entries of a weight where `mask` is True."""
        return cls(mask.sum(dim=1).int(), mask.nonzero()[:, 1].int(), weight[mask].to(SCALE_DTYPE))

    def put(self, values: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """A matrix with these entries in place of its own."""
        rows = torch.arange(len(self.counts)).repeat_interleave(self.counts.long())
        made = values.clone()
        made[rows, self.columns.long()] = self.values.float()
        return made

    def split(self, rows: Sequence[int]) -> list["Outliers"]:
        """Those of layers whose rows were stacked, in order."""
        counts = self.counts.split(list(rows))
        entries = [int(part.sum()) for part in counts]
        cuts = (self.columns.split(entries), self.values.split(entries))
        return [Outliers(*parts) for parts in zip(counts, *cuts, strict=True)]


def outlier_room(count: int, fraction: float) -> int:
    """The most entries that may be kept of so many; one at least, unless none is asked for."""
    return max(1, int(fraction * count)) if fraction > 0 else 0


def spread(
    grids: Shaped[Tensor, "out groups"], group: int, width: int
) -> Shaped[Tensor, "out width"]:
    """Of one entry for each group of inputs, one for each input; the last group may be shorter."""
    return grids.repeat_interleave(group, dim=1)[:, :width]


def told_group(told: Mapping[str, Any], width: int) -> int:
    """Inputs that share a grid; an option of 0 is the whole row."""
    return int(told["group"] or width)


@dataclass(frozen=True, slots=True)
class Quantized(Coded):
    """A weight as codes on one grid per group of consecutive inputs.

    Attributes:
        codes: Grid points, in [0, 2^bits).
        scale: Step of each group's grid, in units of the weight, in SCALE_DTYPE.
        zero: Grid point that stands for 0.0.
        bits: Width of one code.
        group: Inputs per grid; the last group of a row may be shorter.
        symmetric: Every zero point is the middle code, so none is stored: 2^(bits - 1), or that
            of 0.0 among `points`.
        points: What each code stands for before it is scaled, ascending or not, with 0.0 at
            `zero`; None for evenly spaced points, code - zero.
        outliers: Entries that are kept beside the codes; the codes there stand for 0.0.
        input_scale: The codes stand for the weight times this, column by column; whatever
            feeds the layer must be divided by it.  None is all ones.
        activation: How the layer's input is rounded when the model runs; None leaves it.
        notes: What the method had to do that its caller should know, for the report.
    """

    codes: Integer[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero: Integer[Tensor, "out groups"]
    bits: int
    group: int
    symmetric: bool = False
    points: Float[Tensor, " codes"] | None = None
    outliers: Outliers | None = None
    input_scale: Float[Tensor, " in"] | None = None
    activation: Activation | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def layout(cls, rows: int, width: int, told: Mapping[str, Any]) -> Layout:
        """Packed codes (8-bit floats as they are), scales, and what else the quantizer has."""
        bits, groups = int(told["bits"]), -(-width // told_group(told, width))
        kind = told["codes"]
        made: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (torch.uint8, (rows, width))
            if kind == "float8"
            else (torch.int32, (rows, words(width, bits))),
            "scale": (SCALE_DTYPE, (rows, groups)),
        }
        if not told["symmetric"]:
            made["zero"] = (torch.int32, (rows, words(groups, bits)))
        if kind == "points":
            made["points"] = (torch.float32, (2**bits,))
        if kind == "outliers":
            room = outlier_room(rows * width, told["outliers"])
            made["outlier_counts"] = (torch.int32, (rows,))
            made["outlier_columns"] = (_column_dtype(width), (room,))
            made["outlier_values"] = (SCALE_DTYPE, (room,))
        return made

    @classmethod
    def taken(cls, rows: int, width: int, told: Mapping[str, Any]) -> int:
        """Bytes of all that, but for what only fills up words."""
        layout = dict(cls.layout(rows, width, told))
        groups = -(-width // told_group(told, width))
        packed = {"codes": rows * width, "zero": rows * groups}
        bits = sum(int(told["bits"]) * packed[part] for part in packed if part in layout)
        others = [layout[part] for part in layout if part not in packed]
        return -(-bits // 8) + sum(dtype.itemsize * math.prod(shape) for dtype, shape in others)

    def parts(self, told: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those tensors."""
        floats = told["codes"] == "float8"
        made = {
            "codes": self.codes.contiguous() if floats else pack(self.codes, self.bits),
            "scale": self.scale,
        }
        if not self.symmetric:
            made["zero"] = pack(self.zero, self.bits)
        if self.points is not None and not floats:
            made["points"] = self.points
        if self.outliers is not None:
            rows, width = self.codes.shape
            room = outlier_room(rows * width, told["outliers"])
            filling = (0, room - len(self.outliers.columns))
            made["outlier_counts"] = self.outliers.counts
            columns = self.outliers.columns.to(_column_dtype(width))
            made["outlier_columns"] = functional.pad(columns, filling)
            made["outlier_values"] = functional.pad(self.outliers.values, filling)
        return made

    @classmethod
    def read(
        cls, parts: Mapping[str, Tensor], rows: int, width: int, told: Mapping[str, Any]
    ) -> "Quantized":
        """What `parts` gave, but for notes, scales that were folded and activations."""
        bits, scale, kind = int(told["bits"]), parts["scale"], told["codes"]
        codes, points = parts["codes"], parts.get("points")
        if kind == "float8":
            points = float8_points()
        else:
            codes = unpack(codes, bits, width)
            codes = codes if bits > 8 else codes.to(torch.uint8)
        if "zero" in parts:
            zero = unpack(parts["zero"], bits, scale.shape[1])
        else:
            zero = middle(scale, bits, points)
        outliers = None
        if "outlier_counts" in parts:
            kept = int(parts["outlier_counts"].sum())
            columns = parts["outlier_columns"][:kept].int()
            values = parts["outlier_values"][:kept]
            outliers = Outliers(parts["outlier_counts"], columns, values)
        return cls(
            codes,
            scale,
            zero,
            bits,
            told_group(told, width),
            bool(told["symmetric"]),
            points=points,
            outliers=outliers,
        )

    def grid_values(self) -> Float[Tensor, "out in"]:
        """The stored matrix, float32: what the codes stand for before `input_scale` is undone."""
        values = self._on_grid()
        return values if self.outliers is None else self.outliers.put(values)

    def _on_grid(self) -> Float[Tensor, "out in"]:
        rows, width = self.codes.shape
        if self.points is not None:
            return self.points[self.codes.long()] * spread(self.scale.float(), self.group, width)
        if width % self.group:
            zero = spread(self.zero, self.group, width)
            return (self.codes - zero.float()) * spread(self.scale.float(), self.group, width)
        grouped = self.codes.float().view(rows, -1, self.group)  # (out, groups, group)
        values = grouped.sub_(self.zero[..., None]).mul_(self.scale.float()[..., None])
        return values.view(rows, width)

    def bits_per_weight(self) -> float:
        """Everything stored, per weight: codes, 16-bit scales, zeros, points, outliers."""
        grid = SCALE_BITS if self.symmetric else SCALE_BITS + self.bits
        stored = self.codes.numel() * self.bits + self.scale.numel() * grid
        # Those of floats are known without being stored.
        if self.points is not None and not self.points.equal(float8_points()):
            stored += self.points.numel() * 32
        if self.outliers is not None:
            each = 8 * _column_dtype(self.codes.shape[1]).itemsize + SCALE_BITS
            stored += len(self.codes) * 32 + len(self.outliers.columns) * each
        return stored / self.codes.numel()

    def answer(self, inputs: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        """What the layer answers when it runs; whole numbers are multiplied as such.

        With both sides on evenly spaced points, x = a s and w = (c - z) t, group by group

            y = s sum over groups of t (sum of a c - z sum of a)

        where the inner sums are exact: of whole numbers, in 32 bits.
        """
        rounding = self.activation
        exact = self.points is None and self.outliers is None and self.bits <= 8
        if rounding is None or not rounding.whole or not exact:
            return super(Quantized, self).answer(inputs)
        codes, step = rounding.codes(inputs)  # (tokens, in), (tokens, 1) or (1, 1)
        return step * integer_product(codes, self.codes, self.zero, self.scale, self.group)

    def masked(self, kept: Bool[Tensor, "out in"]) -> "Quantized":
        """The same grids, with exactly 0.0 wherever `kept` is False."""
        zero = spread(self.zero, self.group, self.codes.shape[1])
        return replace(self, codes=self.codes.where(kept, zero.to(self.codes.dtype)))

    def split(self, rows: Sequence[int]) -> list["Quantized"]:
        """The results of layers whose rows were stacked, in order."""
        sizes = list(rows)
        cuts = [part.split(sizes) for part in (self.codes, self.scale, self.zero)]
        alone: list[Any] = [None] * len(sizes)
        outliers = alone if self.outliers is None else self.outliers.split(sizes)
        return [
            replace(self, codes=codes, scale=scale, zero=zero, outliers=kept)
            for codes, scale, zero, kept in zip(*cuts, outliers, strict=True)
        ]


def middle(
    scale: Float[Tensor, "out groups"], bits: int, points: Float[Tensor, " codes"] | None = None
) -> Integer[Tensor, "out groups"]:
    """The zero points of grids that store none: the code of 0.0."""
    code = 2 ** (bits - 1)
    if points is not None:
        code = int(points.abs().argmin())
    return torch.full(scale.shape, code, dtype=torch.int32)


def integer_product(
    left: Float[Tensor, "tokens in"],
    codes: Integer[Tensor, "out in"],
    zero: Integer[Tensor, "out groups"],
    scale: Float[Tensor, "out groups"],
    group: int,
) -> Float[Tensor, "tokens out"]:
    """Sum over groups of scale (left codes^T - zero sum of left), the inner sums exact.

    A float32 product of whole numbers is the whole number that an int32 one is as long as no sum
    reaches 2^24, as none of _EXACT inputs does; processors are faster at it than at int8.
    """
    starts, step = _starts(codes.shape[1], group), min(group, _EXACT)
    weights = [_centred(codes, zero, group, start, step).to(left.device) for start in starts]
    scales = scale.float().T.to(left.device)  # (groups, out)
    answers: list[Tensor] = []
    # So many tokens at once that sums stay in the processor's cache.
    for tokens in left.split(max(1, _CACHED // len(codes))):
        total = torch.zeros(len(tokens), len(codes), device=left.device)
        for start, weight in zip(starts, weights, strict=True):
            exact = tokens[:, start : start + weight.shape[1]] @ weight.T
            total.addcmul_(exact, scales[start // group])
        answers.append(total)
    return torch.cat(answers)


def _centred(
    codes: Integer[Tensor, "out in"],
    zero: Integer[Tensor, "out groups"],
    group: int,
    start: int,
    step: int,
) -> Float[Tensor, "out step"]:
    """Codes less their zero points, of inputs that share a grid."""
    stop = min(start + step, (start // group + 1) * group)
    return codes[:, start:stop].float() - zero[:, start // group, None]


def _starts(width: int, group: int) -> list[int]:
    """Where products begin that are cut at groups and after _EXACT inputs of one."""
    return [
        start
        for first in range(0, width, group)
        for start in range(first, min(first + group, width), _EXACT)
    ]


def _column_dtype(width: int) -> torch.dtype:
    return torch.int16 if width <= torch.iinfo(torch.int16).max else torch.int32


def float8_points() -> Float[Tensor, "256"]:
    """What each 8-bit float stands for, by its bit pattern; 0.0 for NaN, which no weight has."""
    patterns = torch.arange(256, dtype=torch.uint8)
    return patterns.view(FLOAT8_DTYPE).float().nan_to_num(0.0)


@dataclass(frozen=True, slots=True)
class Pruned:
    """A weight with some entries removed.

    Attributes:
        kept: True where a weight stays.
        weight: The weights that stay, updated where the method updates; 0.0 elsewhere.
        notes: What the method had to do that its caller should know, for the report.
    """

    kept: Bool[Tensor, "out in"]
    weight: Float[Tensor, "out in"]
    notes: tuple[str, ...] = ()

    def split(self, rows: Sequence[int]) -> list["Pruned"]:
        """The results of layers whose rows were stacked, in order."""
        cuts = (self.kept.split(list(rows)), self.weight.split(list(rows)))
        return [replace(self, kept=k, weight=w) for k, w in zip(*cuts, strict=True)]


@dataclass(frozen=True, slots=True)
class Narrowed:
    """Which units of a layer's inputs stay, and what stands in for those that go.

    Attributes:
        kept: True where a unit stays; one does at least.
        scores: How much each unit matters, comparable between layers; higher is more.
        bias: What is added to the layer's answer, for all that went.
        weight: What reads the channels that stay; its other columns are 0.0.  None where no weight
            that stays is another.
        notes: What the method had to do that its caller should know, for the report.
    """

    kept: Bool[Tensor, " units"]
    scores: Float[Tensor, " units"]
    bias: Float[Tensor, " out"]
    weight: Float[Tensor, "out in"] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LowRank:
    """A correction `left @ right` to add to an approximation of a weight."""

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "rank in"]
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """Columns of the left factor."""
        return self.left.shape[1]

    def truncated(self, rank: int) -> "LowRank":
        """Its first columns and rows."""
        return replace(self, left=self.left[:, :rank], right=self.right[:rank])

    def product(self) -> Float[Tensor, "out in"]:
        """The correction as one matrix."""
        return self.left @ self.right


class Aggregated(NamedTuple):
    """One tensor of the global model after a round.

    Attributes:
        weight: What the server holds now, of the clients' shape, in float32 or wider.
        state: What the method needs of this tensor the next round, by name.
    """

    weight: Float[Tensor, "..."]
    state: Mapping[str, Tensor] = MappingProxyType({})
