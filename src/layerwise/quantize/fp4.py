"""FP4: codes that are 4-bit floats, rounded input by input with error feedback."""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.results import SCALE_DTYPE, Quantized
from layerwise.core.verbs import quantizer
from layerwise.quantize._feedback import factorize, feed_back
from layerwise.quantize._grid import by_group, check_grid, storable

# What scales of groups may be.
Constraint = Literal["none", "m1", "m2"]

_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SIGN = 8  # the bit of the code that says minus
_ABSTRACT = "abstract: weights in FP4 comparable to, if not better than, those in INT4"
_PLAIN = {"group": 64, "symmetric": True, "bits": 4, "options": {"quantize/gptq": {"clips": 1}}}

_FREE = {
    "group": 128,
    "symmetric": True,
    "bits": 4,
    "options": {"quantize/gptq": {"clips": 1}, "quantize/fp4": {"constraint": "none"}},
}


@quantizer(
    Paper(
        "ZeroQuant-FP: A Leap Forward in LLMs Post-Training W4A8 Quantization Using "
        "Floating-Point Formats",
        2023,
        "2307.09782",
    ),
    claims=(
        Claim("gptq", "bytes-wikitext/quantize", _PLAIN, 0.0, _ABSTRACT),
        Claim("gptq", "reference-6m/quantize", _PLAIN, 0.0, _ABSTRACT),
        Claim("gptq", "bytes-wikitext/quantize", _FREE, 0.0, _ABSTRACT),
    ),
    exempt={"pruned_weights_stay_zero": "a zero moves to absorb the errors of its row"},
    rows="independent",
    codes="points",
    widths=(4,),
)
def fp4(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    bits: int = 4,
    group: int = 128,
    symmetric: bool = True,
    constraint: str = "m2",
    damping: float = 0.01,
) -> Quantized:
    """Round to 4-bit floats, E2M1, moving each error onto the inputs not yet rounded.

    A code is a sign, two bits of exponent and one of mantissa.  Its points are

        0, 0.5, 1, 1.5, 2, 3, 4, 6    and the same below 0.0

    and the nearest is taken, the even code where two are as near.  A group whose largest weight
    is m has the scale S = m / 6.  So that 4-bit floats become 8-bit ones by a shift, scales may be
    held to powers of two, of 1 (M1) or of the largest of their row (M2):

        M1:  2^ceil(log2 S)                M2:  S_max / 2^floor(log2(S_max / S))

    Neither is below S, so no weight falls off the end.  Columns are rounded as in quantize/gptq,
    with a group's scale fitted when its first column is reached; S_max is that of the row before.

    Unlike the paper, which writes a ceiling for M2, we take the floor: with the ceiling scales are
    too small, and the largest weights are cut off.  The 8-bit floats that the paper makes of
    inputs are `--activation fp8`, its low-rank correction is compensate/svd.  A scale is stored in
    16 bits whatever the constraint.

    Args:
        weight: Layer to quantize.
        gram: Mean of x x^T over calibration tokens.
        bits: 4; there is no other.
        group: Inputs that share a scale; the last group of a row may be shorter.
        symmetric: Store no zero points.  Floats lie alike on both sides of 0.0 either way.
        constraint: What scales may be: "none", "m1" or "m2".
        damping: Added to the diagonal of `gram`, as a fraction of its mean over live inputs.

    Returns:
        Codes and scales.  Notes say how many inputs were dead and where damping was raised.

    Raises:
        UserError: An option is out of range, a value is NaN or infinite, or H does not factor.
    """
    if bits != 4:
        raise UserError(f"bits is {bits}.", "Give 4: E2M1 codes have no other width.")
    if constraint not in get_args(Constraint):
        raise UserError(f"constraint is {constraint!r}.", "Give none, m1 or m2.")
    check_grid(weight, bits, group)
    factored = factorize(gram, damping)
    rounder = _Floats(weight, group, constraint)
    feed_back(weight, factored, rounder, group)
    scale = rounder.scale.T.contiguous()
    return Quantized(
        rounder.codes.T.contiguous(),
        scale.to(SCALE_DTYPE),
        torch.zeros(scale.shape, dtype=torch.int32),
        bits=bits,
        group=group,
        symmetric=symmetric,
        points=_points(),
        notes=factored.notes,
    )


class _Floats:
    """Rounds columns to 4-bit floats, with scales fitted as groups are reached."""

    def __init__(self, weight: Float[Tensor, "out in"], group: int, constraint: str) -> None:
        self.group, self.constraint = group, constraint
        self.scale = _scales(weight, group).T.contiguous()  # (groups, out)
        # A group of zeros has any scale: it is none to hold others to.
        zeros = by_group(weight, group).abs().amax(dim=-1).T == 0
        self.largest = storable(self.scale.masked_fill(zeros, 0.0).amax(dim=0))  # (out,)
        self.codes = torch.empty(weight.shape[1], len(weight), dtype=torch.uint8)
        self.points = _points()

    def fit(self, start: int, columns: Float[Tensor, "group out"]) -> None:
        """The least scales that reach the largest weights and keep the constraint."""
        fitted = _scales(columns.T, self.group)[:, 0]
        self.scale[start // self.group] = _constrained(fitted, self.largest, self.constraint)

    def round(self, j: int, column: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
        """The nearest point; its code is kept."""
        scale = self.scale[j // self.group]
        self.codes[j] = _codes(column / scale)
        return self.points[self.codes[j].long()] * scale


def _scales(weight: Float[Tensor, "out in"], group: int) -> Float[Tensor, "out groups"]:
    return storable(by_group(weight, group).abs().amax(dim=-1) / _SIZES[-1])


def _constrained(
    scale: Float[Tensor, " out"], largest: Float[Tensor, " out"], constraint: str
) -> Float[Tensor, " out"]:
    """The least scales that a constraint allows and that are not below those given."""
    if constraint == "none":
        return scale
    if constraint == "m1":
        # A power of two has a mantissa of 0.5, and is its own ceiling.
        mantissa, exponent = torch.frexp(scale)
        return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    # 2^floor(log2 r) of an r with a mantissa in [0.5, 1), to the bit.
    return torch.ldexp(largest, 1 - torch.frexp(largest / scale).exponent)


def _codes(scaled: Float[Tensor, " out"]) -> Integer[Tensor, " out"]:
    """The code of the nearest point; of the even one between two."""
    sizes = torch.tensor(_SIZES)
    size = scaled.abs()
    upper = torch.bucketize(size, sizes).clamp_(1, len(_SIZES) - 1)
    low, high = size - sizes[upper - 1], sizes[upper] - size
    # Of two neighbours one is even.
    takes_upper = (high < low) | ((high == low) & (upper % 2 == 0))
    code = upper - 1 + takes_upper.int()
    return code + _SIGN * ((scaled < 0) & (code > 0)).int()


def _points() -> Float[Tensor, "16"]:
    sizes = torch.tensor(_SIZES)
    return torch.cat([sizes, -sizes])
