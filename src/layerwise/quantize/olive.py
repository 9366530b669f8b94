"""OliVe: give an outlier the bits of the weight beside it, which becomes 0.0."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor
from torch.nn import functional

from layerwise.core.activation import Activation
from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.packing import pack, unpack, words
from layerwise.core.results import SCALE_BITS, SCALE_DTYPE, Coded, Layout, spread, told_group
from layerwise.core.verbs import quantizer
from layerwise.quantize._grid import by_group, check_grid, storable

Grid = Literal["int", "flint", "both"]

_BITS = 4
# A sign over eight magnitudes; that of no magnitude says that the other of a pair is an outlier.
_SIGN = _IDENTIFIER = 8
# Table 4, in units where the threshold between normal values and outliers is 32.
_NORMAL: Mapping[Grid, tuple[int, ...]] = {
    "int": (0, 4, 8, 12, 16, 20, 24, 28),
    "flint": (0, 2, 4, 6, 8, 12, 16, 32),
}
_KINDS: tuple[Grid, ...] = tuple(_NORMAL)
# 2^e (1 + m / 2) for e = 5 to 8; the code of 2^5 would be the identifier's.
_OUTLIERS = (0, 48, 64, 96, 128, 192, 256, 384)
_NORMALS = len(_OUTLIERS)
# Of all values in order, the place of 0.0.
_ZERO = _NORMALS + len(_OUTLIERS) - 2
# Ranges of normal values to try, in hundredths of the three deviations.
_RANGES = range(75, 250, 2)

_SOURCE = "tables 6 and 7: 4 bits, nearer to the original than plain 4-bit grids"
_ROWS = {"bits": 4, "group": 0, "symmetric": True}


@dataclass(frozen=True, slots=True)
class Pairs(Coded):
    """A weight as pairs of codes, of which one may stand for a far larger value than the other.

    Attributes:
        codes: A sign and one of eight magnitudes, in [0, 16), row after row, filled up to an even
            width; 8 says that the entry is 0.0 and the other of its pair an outlier.
        scale: Unit of each group's values, in SCALE_DTYPE.
        flint: Normal magnitudes are those of `flint` instead of `int`.
        width: Inputs.
        group: Inputs per scale; the last group of a row may be shorter.
        bits: Width of one code.
        input_scale: None.
        activation: How the layer's input is rounded when the model runs; None leaves it.
        notes: Which magnitudes were taken, for the report.
    """

    codes: Integer[Tensor, "out even"]
    scale: Float[Tensor, "out groups"]
    flint: bool
    width: int
    group: int
    bits: int = _BITS
    input_scale: Float[Tensor, " in"] | None = None
    activation: Activation | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def layout(cls, rows: int, width: int, told: Mapping[str, Any]) -> Layout:
        """Packed codes, scales, and one byte that says which magnitudes they stand for."""
        return {
            "codes": (torch.int32, (rows, words(_even(width), _BITS))),
            "scale": (SCALE_DTYPE, (rows, -(-width // told_group(told, width)))),
            "flint": (torch.uint8, (1,)),
        }

    def parts(self, told: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those tensors."""
        flint = torch.tensor([self.flint], dtype=torch.uint8)
        return {"codes": pack(self.codes, _BITS), "scale": self.scale, "flint": flint}

    @classmethod
    def read(
        cls, parts: Mapping[str, Tensor], rows: int, width: int, told: Mapping[str, Any]
    ) -> "Pairs":
        """What `parts` gave, but for notes and activations."""
        codes = unpack(parts["codes"], _BITS, _even(width)).to(torch.uint8)
        return cls(codes, parts["scale"], bool(parts["flint"]), width, told_group(told, width))

    def grid_values(self) -> Float[Tensor, "out in"]:
        """What the codes stand for: those beside an identifier are outliers."""
        codes = self.codes.long()
        pairs = codes.unflatten(1, (-1, 2))
        beside = pairs.flip(2).flatten(1) == _IDENTIFIER
        normal = _signed(_NORMAL["flint" if self.flint else "int"])[codes]
        values = _signed(_OUTLIERS)[codes].where(beside, normal)[:, : self.width]
        scale = spread(self.scale.float(), self.group, self.width)
        return values * scale

    def bits_per_weight(self) -> float:
        """Everything stored, per weight: codes, 16-bit scales and the byte."""
        stored = self.codes.numel() * _BITS + self.scale.numel() * SCALE_BITS + 8
        return stored / (len(self.codes) * self.width)


@quantizer(
    Paper(
        "OliVe: Accelerating Large Language Models via Hardware-friendly Outlier-Victim Pair "
        "Quantization",
        2023,
        "2304.07493",
    ),
    claims=(
        Claim("rtn", "bytes-wikitext/quantize", _ROWS, 0.2, _SOURCE),
        Claim("rtn", "reference-6m/quantize", _ROWS, 0.2, _SOURCE),
    ),
    codes="own",
    stores=Pairs,
    widths=(_BITS,),
)
def olive(
    weight: Float[Tensor, "out in"],
    *,
    bits: int = _BITS,
    group: int = 0,
    symmetric: bool = True,
    grid: Grid = "both",
) -> Pairs:
    """Let each outlier take the code of the weight beside it, which becomes 0.0.

    Outliers matter, and what lies beside them does not (section 3.2).  Inputs 2i and 2i + 1 are a
    pair.  Weights that round to more than 32 units are outliers; the other of the pair is its
    victim, 0.0, and the victim's code is an identifier that says so, so that an outlier has codes
    of its own and nothing lies out of place.  In units of the scale, values are plus or minus

        normal int:     0, 4, 8, 12, 16, 20, 24, 28
        normal flint:   0, 2, 4, 6, 8, 12, 16, 32
        outlier E2M1:   2^e (1 + m / 2), e = 5 .. 8:    48, 64, 96, 128, 192, 256, 384

    where the outlier of 32 is left out, for its code is the identifier's (section 3.3).  Codes
    are 4 bits: a sign and a magnitude; -0 is the identifier.  Each weight becomes the nearest
    value, of both kinds; then victims are chosen.  The scale of a group is the one with the least
    squared error after that, victims included (section 4.3):

        scale = a max(|mean(w) + 3 std(w)|, |mean(w) - 3 std(w)|) / max(normal),
        a = 0.75, 0.77 .. 2.49

    and the layer takes whichever of int and flint loses less with these.

    This rounds the weights alone, of which the paper also does the inputs.  Unlike the authors'
    code, where both of a pair are outliers the larger survives, not the first; pairs lie within a
    row, of which a last, single input is paired with nothing; and the deviation is that of the
    population, so that a group of one weight has one.

    Args:
        weight: Layer to quantize.
        bits: 4; there is no other.
        group: Inputs that share a scale, an even number; 0 is the whole row.
        symmetric: Store no zero points; none are stored either way.
        grid: Normal magnitudes: "int", "flint", or "both" for the better of them.

    Returns:
        Pairs of codes.  A note says which magnitudes were taken.

    Raises:
        UserError: An option is out of range, or the weight holds NaN or infinity.
    """
    width = weight.shape[1]
    group = min(group or width, width)
    if bits != _BITS:
        raise UserError(f"bits is {bits}.", f"Give {_BITS}: pairs have no other width.")
    if grid not in get_args(Grid):
        raise UserError(f"grid is {grid!r}.", f"Give {', '.join(get_args(Grid))}.")
    check_grid(weight, bits, group)
    if group % 2 and group < width:
        raise UserError(f"group is {group}, which cuts a pair.", "Give an even group.")
    even = functional.pad(weight.float(), (0, _even(width) - width))
    grouped = by_group(even, _even(group))  # (out, groups, group)
    tried = {kind: _best(grouped, kind, width) for kind in _KINDS if grid in (kind, "both")}
    kind = min(tried, key=lambda kind: tried[kind].error)
    best = tried[kind]
    codes = best.codes.flatten(1)[:, : _even(width)]  # (out, even)
    scale = best.scale.to(SCALE_DTYPE)
    return Pairs(
        codes.contiguous(), scale, kind == "flint", width, group, notes=(f"{kind} magnitudes",)
    )


class _Tried(NamedTuple):
    codes: Integer[Tensor, "out groups group"]
    scale: Float[Tensor, "out groups"]
    error: float


def _best(grouped: Float[Tensor, "out groups group"], kind: Grid, width: int) -> _Tried:
    """The codes at the scale of each group that loses least."""
    reach = _reach(grouped, width) / _NORMAL[kind][-1]
    values = _values(kind)
    least = torch.full_like(reach, math.inf)
    scale = storable(reach)
    for hundredths in _RANGES:
        tried = storable(reach * (hundredths / 100))
        places = _places(grouped / tried[..., None], values)
        error = (values[places] * tried[..., None] - grouped).square_().sum(dim=-1)
        better = error < least
        least, scale = error.where(better, least), tried.where(better, scale)
    codes = _codes(_places(grouped / scale[..., None], values))
    return _Tried(codes, scale, float(least.sum(dtype=torch.float64)))


def _reach(grouped: Float[Tensor, "out groups group"], width: int) -> Float[Tensor, "out groups"]:
    """The farther end of three deviations around each group's mean."""
    size = grouped.shape[2]
    # Zeros that fill up the last group have no part in it.
    counts = torch.full((grouped.shape[1],), size)
    counts[-1] = width - size * (len(counts) - 1)
    there = torch.arange(size) < counts[:, None]  # (groups, group)
    mean = grouped.sum(dim=-1) / counts
    spread = (grouped - mean[..., None]).square_().mul_(there).sum(dim=-1) / counts
    deviation = 3 * spread.sqrt()
    return torch.maximum((mean + deviation).abs(), (mean - deviation).abs())


def _values(kind: Grid) -> Float[Tensor, " values"]:
    """All that a weight may become, ascending, in units of the scale."""
    sizes = torch.tensor([*_NORMAL[kind], *_OUTLIERS[1:]], dtype=torch.float32)
    return torch.cat([-sizes[1:].flip(0), sizes])


def _places(
    scaled: Float[Tensor, "*grids group"], values: Float[Tensor, " values"]
) -> Int[Tensor, "*grids group"]:
    """The place of each weight's value among all, that of 0.0 for victims."""
    between = (values[1:] + values[:-1]) / 2
    places = torch.bucketize(scaled.contiguous(), between, right=True)
    sizes = _sizes(places)
    first, second = (sizes * (sizes >= _NORMALS)).unflatten(-1, (-1, 2)).unbind(-1)
    # The smaller of two outliers is a victim; of equals, the second.
    victims = torch.stack([second > first, (first > 0) & (first >= second)], dim=-1)
    return places.masked_fill_(victims.flatten(-2), _ZERO)


def _codes(places: Int[Tensor, "*grids group"]) -> Integer[Tensor, "*grids group"]:
    """A sign and a magnitude for each place, and the identifier for victims."""
    sizes = _sizes(places)
    outliers = sizes >= _NORMALS
    victims = outliers.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    codes = sizes.where(~outliers, sizes - _NORMALS + 1) + _SIGN * (places < _ZERO)
    return codes.masked_fill_(victims, _IDENTIFIER).to(torch.uint8)


def _sizes(places: Int[Tensor, "*grids group"]) -> Int[Tensor, "*grids group"]:
    """How many magnitudes are smaller: normal ones, and then those of outliers."""
    return (places - _ZERO).abs()


def _signed(sizes: Sequence[int]) -> Float[Tensor, "16"]:
    """What the codes stand for whose magnitudes these are."""
    magnitudes = torch.tensor(sizes, dtype=torch.float32)
    return torch.cat([magnitudes, -magnitudes])


def _even(width: int) -> int:
    return width + width % 2
