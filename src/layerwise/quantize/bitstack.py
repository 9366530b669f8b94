"""BitStack: signs times a low-rank magnitude, then the same for what is left, again and again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Float64, UInt8
from torch import Tensor

from layerwise.core.activation import Activation
from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.packing import BYTE, pack_bits, unpack_bits
from layerwise.core.results import Coded, Layout
from layerwise.core.statistics import check_statistics
from layerwise.core.verbs import quantizer

_MOST_BLOCKS = 16
# Inputs or outputs, whichever are fewer, for which a magnitude has one column.
_PER_COLUMN = 256
# Directions that are followed beside those that are kept, and how often they are multiplied.
_SPARE, _PASSES = 8, 6
# Singular values below this share of the largest are what rounding left.
_LEAST_SINGULAR = 1e-6

_SOURCE = "abstract: matches or beats quantizers of one size at equal memory; Llama at 2 to 3 bits"


@dataclass(frozen=True, slots=True)
class SignBlocks(Coded):
    """A weight as a sum of blocks, each of signs and a low-rank magnitude.

    The first t blocks are what the method makes of the layer when it is asked for t.

    Attributes:
        signs: Of each block, row after row, eight to a byte, the first in its lowest bit; 1 is
            positive.
        left: Of each block, float16.
        right: Of each block, float16.
        bits: Blocks.
        input_scale: None.
        activation: How the layer's input is rounded when the model runs; None leaves it.
        notes: What the method had to do that its caller should know, for the report.
    """

    signs: UInt8[Tensor, "blocks bytes"]
    left: Float[Tensor, "blocks out columns"]
    right: Float[Tensor, "blocks columns in"]
    bits: int
    input_scale: Float[Tensor, " in"] | None = None
    activation: Activation | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def layout(cls, rows: int, width: int, told: Mapping[str, Any]) -> Layout:
        """Signs and both factors; the first axis of each counts blocks."""
        blocks, columns = int(told["bits"]), _columns(rows, width, int(told["factors"]))
        return {
            "signs": (torch.uint8, (blocks, -(-rows * width // BYTE))),
            "left": (torch.float16, (blocks, rows, columns)),
            "right": (torch.float16, (blocks, columns, width)),
        }

    def parts(self, told: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those tensors."""
        return {"signs": self.signs, "left": self.left, "right": self.right}

    @classmethod
    def read(
        cls, parts: Mapping[str, Tensor], rows: int, width: int, told: Mapping[str, Any]
    ) -> "SignBlocks":
        """What `parts` gave, but for notes and activations."""
        return cls(parts["signs"], parts["left"], parts["right"], len(parts["signs"]))

    def grid_values(self) -> Float[Tensor, "out in"]:
        """The sum of all blocks."""
        rows, width = self.left.shape[1], self.right.shape[2]
        total = torch.zeros(rows, width)
        for signs, left, right in zip(self.signs, self.left, self.right, strict=True):
            positive = unpack_bits(signs[None], rows * width).reshape(rows, width)
            total += _signed(positive, left.float() @ right.float())
        return total

    def bits_per_weight(self) -> float:
        """Everything stored, per weight: signs, to whole bytes in each block, and factors."""
        stored = sum(part.nbytes for part in (self.signs, self.left, self.right))
        return BYTE * stored / (self.left.shape[1] * self.right.shape[2])


@quantizer(
    Paper(
        "BitStack: Fine-Grained Size Control for Compressed Large Language Models in Variable "
        "Memory Environments",
        2024,
        "2410.23918",
    ),
    # Groups concern the baseline alone: 2 bits are 2.28 in groups of 64 and 2.56 in groups of 32,
    # against 2.44 of two blocks on bytes-wikitext and 2.20 on reference-6m.
    claims=(
        Claim("rtn", "bytes-wikitext/quantize", {"bits": 2, "group": 64}, 0.0, _SOURCE),
        Claim("rtn", "bytes-wikitext/quantize", {"bits": 2, "group": 32}, 0.0, _SOURCE),
        Claim("gptq", "bytes-wikitext/quantize", {"bits": 2, "group": 32}, 0.0, _SOURCE),
        Claim("rtn", "reference-6m/quantize", {"bits": 2, "group": 64}, 0.0, _SOURCE),
    ),
    exempt={
        "each_bit_quarters_the_loss": "a block of noise leaves 1 - 2 / pi of it, not a quarter",
        "pruned_weights_stay_zero": "0.0 has a sign, and the magnitude of its row and column",
    },
    codes="own",
    stores=SignBlocks,
    widths=range(1, _MOST_BLOCKS + 1),
)
def bitstack(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    bits: int,
    group: int = 0,
    symmetric: bool = False,
    factors: int = 0,
) -> SignBlocks:
    """Store signs and a low-rank magnitude, then those of what is left, block after block.

    With R = W diag(s) at first, where s is how large each input is, block i is

        S_i = sign(R), sign(0) = +1        |R| ~ U_k Sigma_k V_k^T
        u_i = U_k sqrt(Sigma_k)            v_i = sqrt(Sigma_k) V_k^T
        R <- R - S_i o (u_i v_i)

    and t blocks stand for sum over i < t of S_i o (u_i v_i) diag(s)^-1.  |R| has no negative
    entries, so one pair of vectors holds most of it.  A block takes 1 + 16 k (out + in) / (out in)
    bits for each weight; the first t blocks of any number are the result for t.

    Unlike the authors' code, which divides the norm or layer before by s and leaves layers alone
    that have none, v_i is stored as v_i diag(s)^-1, of the same rank: the scale costs nothing,
    every layer has one, whatever feeds it, and nothing else in the model changes.

    Unlike the authors' code, whose s_j is the mean over sequences of the L2 norm of x_j over a
    sequence, and 1e-3 more, ours is the root of the mean of x_j^2 over tokens.  Where all
    sequences have the same energy the two differ by one factor for all inputs, which changes
    nothing.  An input that calibration never saw is scaled like the faintest one that it did see.

    Unlike the authors' code, what is subtracted is what is stored, in float16, so that a block
    makes up for the rounding of the last; v_i is rounded first, and u_i is the best there is for
    it.  Singular vectors are found by subspace iteration from a fixed start.

    Args:
        weight: Layer to quantize.
        gram: Mean of x x^T over calibration tokens; only its diagonal is read.
        bits: Blocks, from 1 to 16.
        group: There are no groups; whatever is given changes nothing.
        symmetric: Store no zero points; none are stored either way.
        factors: Columns of a magnitude's factors, k, min(out, in) at most; 0 is one for each 256
            of min(out, in), rounded, and at least one.

    Returns:
        The blocks, in order.

    Raises:
        UserError: An option is out of range, a value is NaN or infinite, or weights are too large
            for factors in float16.
    """
    if not 1 <= bits <= _MOST_BLOCKS:
        raise UserError(f"bits is {bits}.", f"Give the number of blocks, 1 to {_MOST_BLOCKS}.")
    if group < 0:
        raise UserError(f"group is {group}.", "Leave it out: there are no groups.")
    if not weight.numel():
        raise UserError(f"the weight is empty, {tuple(weight.shape)}.", "Leave the layer out.")
    if not weight.isfinite().all():
        raise UserError(
            "the weight holds NaN or infinity.", "Repair the checkpoint or leave the layer out."
        )
    check_statistics(gram)
    columns = _columns(len(weight), weight.shape[1], factors)
    scale = _scale(gram)
    remaining = weight.float() * scale
    signs: list[Tensor] = []
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    for _ in range(bits):
        positive = remaining >= 0
        left, right = _factors(remaining.abs(), scale, columns)
        remaining = remaining - _signed(positive, left.float() @ (right.float() * scale))
        signs.append(pack_bits(positive.reshape(1, -1))[0])
        lefts.append(left)
        rights.append(right)
    return SignBlocks(torch.stack(signs), torch.stack(lefts), torch.stack(rights), bits)


def _columns(rows: int, width: int, factors: int) -> int:
    """Columns of a magnitude's factors.

    Raises:
        UserError: A negative number is asked for.
    """
    if factors < 0:
        raise UserError(f"factors is {factors}.", "Give the columns of a magnitude's factors.")
    least = min(rows, width)
    return min(factors, least) if factors else max(1, round(least / _PER_COLUMN))


def _scale(gram: Float[Tensor, "in in"]) -> Float[Tensor, " in"]:
    """The size of each input, of which the geometric mean is 1; all ones if none was seen."""
    sizes = gram.diagonal().double().clamp(min=0).sqrt()
    live = sizes[sizes > 0]
    if not len(live):
        return torch.ones(len(sizes))
    logs = sizes.clamp(min=float(live.amin())).log()
    return (logs - logs.mean()).exp().float()


def _factors(
    sizes: Float[Tensor, "out in"], scale: Float[Tensor, " in"], columns: int
) -> tuple[Float[Tensor, "out columns"], Float[Tensor, "columns in"]]:
    """The best factors of a magnitude, float16, those on the right divided by the scale.

    Raises:
        UserError: One is too large for float16.
    """
    # Float64 has room for squares of whatever float32 holds.
    wide = sizes.double()
    right = _directions(wide, columns).T @ wide  # (columns, in)
    singular = torch.linalg.vector_norm(right, dim=1, keepdim=True)
    seen = singular > _LEAST_SINGULAR * singular.amax()
    right = right * singular.where(seen, torch.inf).rsqrt()
    stored = (right / scale).half()
    rounded = stored.double() * scale
    inverse = cast("Tensor", torch.linalg.pinv(rounded @ rounded.T, hermitian=True))
    left = (wide @ rounded.T @ inverse).half()
    if not (left.isfinite().all() and stored.isfinite().all()):
        raise UserError(
            f"the weight's factors are too large for float16; its sizes go to {sizes.amax():g}.",
            "Leave the layer out: no weight of a trained network is that large.",
        )
    return left, stored


def _directions(matrix: Float64[Tensor, "out in"], count: int) -> Float64[Tensor, "out count"]:
    """The first left singular vectors, by subspace iteration."""
    followed = min(count + _SPARE, *matrix.shape)
    noise = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], followed, generator=noise, dtype=torch.float64)
    basis = _orthonormal(matrix @ start)
    for _ in range(_PASSES):
        basis = _orthonormal(matrix @ (matrix.T @ basis))
    inner = basis.T @ matrix
    _, turned = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(inner @ inner.T))
    return basis @ turned.flip(1)[:, :count]


def _orthonormal(vectors: Float64[Tensor, "out count"]) -> Float64[Tensor, "out count"]:
    """A basis of what vectors span."""
    basis, _ = cast("tuple[Tensor, Tensor]", torch.linalg.qr(vectors))
    return basis


def _signed(
    positive: Bool[Tensor, "out in"], magnitude: Float[Tensor, "out in"]
) -> Float[Tensor, "out in"]:
    """A magnitude with signs."""
    return magnitude.where(positive, -magnitude)
