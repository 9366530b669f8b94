"""Blocks of quantized weights as GGUF lays them out, and what stands in them.

A block holds 32 weights (256 in Q6_K) of one row.  With d and m as float16:

    Q8_0   d, 32 x int8                          w = d q              34 bytes
    Q4_0   d, 32 x 4 bits                        w = d (q - 8)        18 bytes
    Q4_1   d, m, 32 x 4 bits                     w = d q + m          20 bytes
    Q5_0   d, 32 high bits, 32 x 4 bits          w = d (q - 16)       22 bytes
    Q5_1   d, m, 32 high bits, 32 x 4 bits       w = d q + m          24 bytes
    Q6_K   256 x 4 bits, 256 x 2 high bits,      w = d s (q - 32)     210 bytes
           s as 16 x int8, d

Two 4-bit codes share a byte: weight i of a block, in the low half, and weight i + 16 (in Q6_K
weights i and i + 64 of each 128).  https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from layerwise.core.results import Quantized

_LARGEST_SCALE = 127  # of Q6_K's int8 scales


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of blocks.

    Attributes:
        name: What GGUF calls it.
        bits: Width of a code.
        symmetric: It has no minima.
        weights: Weights of a block.
        size: Bytes of a block.
        group: Weights that share a scale.
    """

    name: str
    bits: int
    symmetric: bool
    weights: int
    size: int
    group: int = 32

    def bytes_of(self, width: int) -> int:
        """Bytes of a row of so many weights."""
        return width // self.weights * self.size


KINDS: Mapping[tuple[int, bool], Kind] = MappingProxyType(
    {
        (kind.bits, kind.symmetric): kind
        for kind in (
            Kind("Q4_0", 4, True, 32, 18),
            Kind("Q4_1", 4, False, 32, 20),
            Kind("Q5_0", 5, True, 32, 22),
            Kind("Q5_1", 5, False, 32, 24),
            Kind("Q6_K", 6, True, 256, 210, group=16),
            Kind("Q8_0", 8, True, 32, 34),
        )
    }
)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows of a matrix as numbers that blocks hold.

    Attributes:
        kind: Their type.
        codes: In [0, 2^bits).
        scale: d of each block, float16.
        minimum: m of each block, float16; None without minima.
        steps: s of each group, int8; None where a block is one group.
    """

    kind: Kind
    codes: UInt8[Tensor, "rows blocks weights"]
    scale: Float[Tensor, "rows blocks"]
    minimum: Float[Tensor, "rows blocks"] | None = None
    steps: Shaped[Tensor, "rows blocks groups"] | None = None

    def finite(self) -> bool:
        """Whether every scale and minimum fits into float16."""
        held = [self.scale] if self.minimum is None else [self.scale, self.minimum]
        return all(bool(part.isfinite().all()) for part in held)

    def values(self) -> Float[Tensor, "rows width"]:
        """The weights that a loader computes of them, in float32."""
        codes, scale = self.codes.float(), self.scale.float()[..., None]
        if self.minimum is not None:
            values = codes.mul_(scale).add_(self.minimum.float()[..., None])
        elif self.steps is None:
            values = codes.sub_(2 ** (self.kind.bits - 1)).mul_(scale)
        else:
            step = (scale * self.steps.float()).repeat_interleave(self.kind.group, dim=-1)
            values = codes.sub_(2 ** (self.kind.bits - 1)).mul_(step)
        return values.flatten(1)

    def packed(self) -> UInt8[Tensor, "rows size"]:
        """Their bytes."""
        codes, parts = self.codes, [_bytes(self.scale)]
        if self.steps is not None:
            halves = codes.unflatten(-1, (2, 4, 32))  # (rows, blocks, halves, quarters, 32)
            low = halves & 15
            paired = low[..., :2, :] | low[..., 2:, :] << 4
            shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
            high = (halves >> 4 << shifts).sum(dim=-2, dtype=torch.uint8)
            parts = [paired.flatten(-3), high.flatten(-2), _signed(self.steps), *parts]
        elif self.kind.bits == 8:
            parts.append(codes ^ 128)  # q + 128 as a signed byte
        else:
            if self.minimum is not None:
                parts.append(_bytes(self.minimum))
            if self.kind.bits == 5:
                lanes = (codes >> 4).unflatten(-1, (4, 8))
                weights = 2 ** torch.arange(8, dtype=torch.uint8)
                parts.append((lanes * weights).sum(dim=-1, dtype=torch.uint8))
            low = codes & 15
            parts.append(low[..., :16] | low[..., 16:] << 4)
        return torch.cat(parts, dim=-1).flatten(1)


def blocks(quantized: Quantized) -> Blocks:
    """The numbers that stand for codes, their scales rounded as the blocks hold them.

    Where d and s of Q6_K cannot give a group the scale it has, its codes are chosen anew:

        d = max(scale) / 127    s = round(scale / d)    q = round((code - 32) scale / (d s)) + 32
    """
    kind = KINDS[quantized.bits, quantized.symmetric]
    codes = quantized.codes.to(torch.uint8).unflatten(1, (-1, kind.weights))
    if kind.group == kind.weights:
        scale = quantized.scale.half()
        if kind.symmetric:
            return Blocks(kind, codes, scale)
        return Blocks(kind, codes, scale, (-quantized.zero * scale.float()).half())
    wanted = quantized.scale.float().unflatten(1, (-1, kind.weights // kind.group))
    scale = _at_least(wanted.amax(dim=-1) / _LARGEST_SCALE)
    divisor = scale.float()[..., None]
    steps = torch.where(divisor > 0, wanted / divisor, 0.0).round().clamp(max=_LARGEST_SCALE)
    ratio = torch.where(steps > 0, wanted / (steps * divisor), 0.0)  # an infinite d is refused
    middle = 2 ** (kind.bits - 1)
    moved = (codes.float() - middle) * ratio.repeat_interleave(kind.group, dim=-1)
    chosen = moved.round().nan_to_num().clamp(-middle, middle - 1) + middle
    return Blocks(kind, chosen.to(torch.uint8), scale, steps=steps.nan_to_num().to(torch.int8))


def _at_least(wanted: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The next float16 that is no smaller, for numbers that are not negative."""
    rounded = wanted.half()
    short = rounded.float() < wanted
    return (rounded.view(torch.int16) + short.short()).view(torch.float16)


def _bytes(numbers: Float[Tensor, "rows blocks"]) -> UInt8[Tensor, "rows blocks 2"]:
    return numbers[..., None].contiguous().view(torch.uint8)


def _signed(steps: Shaped[Tensor, "rows blocks groups"]) -> UInt8[Tensor, "rows blocks groups"]:
    return steps.contiguous().view(torch.uint8)
