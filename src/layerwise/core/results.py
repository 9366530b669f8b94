"""What methods return: small frozen dataclasses of named tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

# What a scale is stored as, whatever the weight's dtype: it has the range of float32, so no layer
# overflows it, and an output's layout is known before its weights are read.
SCALE_DTYPE = torch.bfloat16
SCALE_BITS = 8 * SCALE_DTYPE.itemsize
# What codes that are 8-bit floats are the bit patterns of: E4M3, whose largest value is 448.
FLOAT8_DTYPE = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Quantized:
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
        input_scale: The codes stand for the weight times this, column by column; whatever
            feeds the layer must be divided by it.  None is all ones.
        notes: What the method had to do that its caller should know, for the report.
    """

    codes: Integer[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero: Integer[Tensor, "out groups"]
    bits: int
    group: int
    symmetric: bool = False
    points: Float[Tensor, " codes"] | None = None
    input_scale: Float[Tensor, " in"] | None = None
    notes: tuple[str, ...] = ()

    def grid_values(self) -> Float[Tensor, "out in"]:
        """The stored matrix, float32: what the codes stand for before `input_scale` is undone."""
        rows, width = self.codes.shape
        if self.points is not None:
            scale = self.scale.float().repeat_interleave(self.group, dim=1)[:, :width]
            return self.points[self.codes.long()] * scale
        if width % self.group:
            scale = self.scale.float().repeat_interleave(self.group, dim=1)[:, :width]
            zero = self.zero.repeat_interleave(self.group, dim=1)[:, :width]
            return (self.codes - zero.float()) * scale
        grouped = self.codes.float().view(rows, -1, self.group)  # (out, groups, group)
        values = grouped.sub_(self.zero[..., None]).mul_(self.scale.float()[..., None])
        return values.view(rows, width)

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The weight these codes stand for, float32."""
        values = self.grid_values()
        return values if self.input_scale is None else values / self.input_scale

    def bits_per_weight(self) -> float:
        """Everything stored, per weight: the codes, 16-bit scales and `bits`-wide zeros."""
        grid = SCALE_BITS if self.symmetric else SCALE_BITS + self.bits
        stored = self.codes.numel() * self.bits + self.scale.numel() * grid
        return stored / self.codes.numel()

    def masked(self, kept: Bool[Tensor, "out in"]) -> "Quantized":
        """The same grids, with exactly 0.0 wherever `kept` is False."""
        width = self.codes.shape[1]
        zero = self.zero.repeat_interleave(self.group, dim=1)[:, :width]
        return replace(self, codes=self.codes.where(kept, zero.to(self.codes.dtype)))

    def split(self, rows: Sequence[int]) -> list["Quantized"]:
        """The results of layers whose rows were stacked, in order."""
        cuts = [part.split(list(rows)) for part in (self.codes, self.scale, self.zero)]
        return [
            replace(self, codes=codes, scale=scale, zero=zero)
            for codes, scale, zero in zip(*cuts, strict=True)
        ]


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
