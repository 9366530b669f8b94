"""PVQ: a group of weights as a length and a direction, of whole numbers that are numbered."""

import functools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerwise.core.activation import Activation
from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.results import SCALE_BITS, SCALE_DTYPE, Coded, Layout, told_group
from layerwise.core.statistics import check_statistics
from layerwise.core.verbs import quantizer
from layerwise.quantize._grid import check_grid

_BYTE = 8
_MOST_BITS = 6
# Directions of more inputs have more numbers than a table of them has room for.
_MOST_GROUP = 256
# Dampings to try, each ten times the last.
_TRIES = 8

_SOURCE = "abstract: less loss than even steps at equal bits; LLMs at about 3 bits"


class _Sphere(NamedTuple):
    """The whole-number vectors of G entries whose magnitudes sum to K.

    `counts[n][k]` is how many there are of n entries that sum to k, and `before[n][k]` twice the
    sum of those counts for less than k.
    """

    pulses: int
    bits: int
    counts: Sequence[Sequence[int]]
    before: Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Pyramid(Coded):
    """A weight as one direction and one length for each group of consecutive inputs.

    A direction is stored as its number among all directions.

    Attributes:
        vectors: Whole numbers, int16, whose magnitudes in each group sum to K.
        length: Of each group, in SCALE_DTYPE; 0.0 for a group of zeros.
        bits: Width of an entry of a direction, at most, on average over a group.
        group: Inputs per direction; the last group of a row may be shorter.
        input_scale: None.
        activation: How the layer's input is rounded when the model runs; None leaves it.
        notes: What the method had to do that its caller should know, for the report.
    """

    vectors: Int[Tensor, "out in"]
    length: Float[Tensor, "out groups"]
    bits: int
    group: int
    input_scale: Float[Tensor, " in"] | None = None
    activation: Activation | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def layout(cls, rows: int, width: int, told: Mapping[str, Any]) -> Layout:
        """The numbers of a row's directions, one after another, and their lengths."""
        spheres = _spheres(width, told_group(told, width), int(told["bits"]))
        filled = -(-sum(sphere.bits for sphere in spheres) // _BYTE)
        return {
            "index": (torch.uint8, (rows, filled)),
            "length": (SCALE_DTYPE, (rows, len(spheres))),
        }

    def parts(self, told: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those tensors."""
        width = self.vectors.shape[1]
        spheres = _spheres(width, self.group, self.bits)
        filled = -(-sum(sphere.bits for sphere in spheres) // _BYTE)
        stored = bytearray()
        for row in cast("list[list[int]]", self.vectors.tolist()):
            number = shift = 0
            for place, sphere in enumerate(spheres):
                entries = row[place * self.group : (place + 1) * self.group]
                number |= _index(entries, sphere) << shift
                shift += sphere.bits
            stored += number.to_bytes(filled, "little")
        index = torch.frombuffer(stored, dtype=torch.uint8).reshape(-1, filled)
        return {"index": index, "length": self.length}

    @classmethod
    def read(
        cls, parts: Mapping[str, Tensor], rows: int, width: int, told: Mapping[str, Any]
    ) -> "Pyramid":
        """What `parts` gave, but for notes and activations."""
        group, bits = min(told_group(told, width), width), int(told["bits"])
        spheres = _spheres(width, group, bits)
        vectors: list[list[int]] = []
        for stored in parts["index"]:
            number = int.from_bytes(bytes(cast("list[int]", stored.tolist())), "little")
            row: list[int] = []
            for place, sphere in enumerate(spheres):
                entries = min(group, width - place * group)
                row += _entries(number & ((1 << sphere.bits) - 1), entries, sphere)
                number >>= sphere.bits
            vectors.append(row)
        return cls(torch.tensor(vectors, dtype=torch.int16), parts["length"], bits, group)

    def grid_values(self) -> Float[Tensor, "out in"]:
        """Each group's direction, of length 1, times its length."""
        cuts = self.vectors.float().split(self.group, dim=1)
        unit = [cut / torch.linalg.vector_norm(cut, dim=1, keepdim=True) for cut in cuts]
        lengths = self.length.float().split(1, dim=1)
        return torch.cat([u * length for u, length in zip(unit, lengths, strict=True)], dim=1)

    def bits_per_weight(self) -> float:
        """Everything stored, per weight: the numbers of directions, to whole bytes, and lengths."""
        rows, width = self.vectors.shape
        filled = -(-sum(one.bits for one in _spheres(width, self.group, self.bits)) // _BYTE)
        return (rows * filled * _BYTE + self.length.numel() * SCALE_BITS) / self.vectors.numel()


@quantizer(
    Paper("Pyramid Vector Quantization for LLMs", 2024, "2410.16926"),
    claims=(
        Claim("rtn", "bytes-wikitext/quantize", {"bits": 2, "group": 128}, 0.3, _SOURCE),
        Claim("rtn", "bytes-wikitext/quantize", {"bits": 3, "group": 128}, 0.3, _SOURCE),
        Claim("gptq", "bytes-wikitext/quantize", {"bits": 3, "group": 128}, 0.0, _SOURCE),
        Claim("gptq", "reference-6m/quantize", {"bits": 3, "group": 64}, 0.0, _SOURCE),
    ),
    exempt={"pruned_weights_stay_zero": "a zero moves to absorb the errors of its row"},
    codes="own",
    stores=Pyramid,
    widths=range(1, _MOST_BITS + 1),
)
def pvq(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    bits: int,
    group: int = 128,
    symmetric: bool = True,
    feedback: bool = True,
    damping: float = 0.01,
) -> Pyramid:
    """Find the direction of each group among whole-number vectors, and its length.

    A group of G weights is rho v / |v|_2 with v of whole numbers whose magnitudes sum to K.  Of
    those there are N(G, K), which are numbered, not stored:

        N(G, K) = N(G - 1, K) + N(G, K - 1) + N(G - 1, K - 1)

    so that a direction takes ceil(log2 N(G, K)) bits; K is the largest with at most `bits` of
    them for each weight.  The direction is found greedily: with a = |w|,

        v = floor(K a / |a|_1), then until its entries sum to K add 1 to the entry that maximizes
        (a . v + a_i)^2 / (v . v + 2 v_i + 1)

    and takes the signs of w.  The length is the best there is for it, rho = w . v / |v|_2.

    With feedback, groups are taken from left to right, and the inputs to come absorb what each of
    them lost, E_g, as far as the inputs' second moments H say that they can:

        W_rest -= E_g U_gg^-1 U_g,rest

    where U is the upper Cholesky factor of H^-1 = U^T U and H is the gram matrix plus `damping`
    times the mean of its diagonal over live inputs.

    Unlike the paper, lengths are stored in 16 bits, not as quantiles of a Beta distribution, and
    nothing is rotated before.  The paper does not say how a last, shorter group is to be coded: it
    gets a K of its own.

    Args:
        weight: Layer to quantize.
        gram: Mean of x x^T over calibration tokens.
        bits: Most bits of a direction, for each weight of its group, from 1 to 6.
        group: Inputs of a direction, at most 256 of a row.
        symmetric: Store no zero points; none are stored either way.
        feedback: Let later groups absorb the errors of earlier ones; the gram matrix is read for
            nothing else.
        damping: Added to the diagonal, as a fraction of its mean over live inputs; ten times
            more, and a note, as often as H does not factor.

    Returns:
        Directions and lengths.  A note says where damping was raised.

    Raises:
        UserError: An option is out of range, a value is NaN or infinite, or H does not factor.
    """
    check_grid(weight, bits, group)
    if not 0 < damping < math.inf:
        raise UserError(f"damping is {damping}.", "Give a finite damping above 0.")
    left = weight.to(torch.float64, copy=True)
    if not left.isfinite().all():
        raise UserError(
            "the weight holds NaN or infinity.", "Repair the checkpoint or leave the layer out."
        )
    check_statistics(gram)
    width = weight.shape[1]
    group = min(group, width)
    spheres = _spheres(width, group, bits)
    factor, notes = _factor(gram, damping) if feedback else (None, ())
    vectors: list[Tensor] = []
    lengths: list[Tensor] = []
    for place, sphere in enumerate(spheres):
        start, stop = place * group, min((place + 1) * group, width)
        values = left[:, start:stop].float()
        vector, length = _nearest(values, sphere.pulses)
        vectors.append(vector.to(torch.int16))
        lengths.append(length.to(SCALE_DTYPE))
        if factor is not None and stop < width:
            unit = vector / torch.linalg.vector_norm(vector, dim=1, keepdim=True)
            error = left[:, start:stop] - (unit * lengths[-1].float()[:, None]).double()
            own = factor[start:stop, start:stop]
            share = torch.linalg.solve_triangular(own, factor[start:stop, stop:], upper=True)
            left[:, stop:] -= error @ share
    return Pyramid(torch.cat(vectors, 1), torch.stack(lengths, 1), bits, group, notes=notes)


def _nearest(
    values: Float[Tensor, "rows group"], pulses: int
) -> tuple[Float[Tensor, "rows group"], Float[Tensor, " rows"]]:
    """The vector of so many pulses nearest in direction, as the greedy search has it; its length.

    A group of zeros has all pulses on its first entry, and length 0.0.
    """
    peak = values.abs().amax(dim=1, keepdim=True)
    # Of size 1, so that no square overflows or vanishes; any size will do for zeros.
    sizes = values.abs() / peak.masked_fill(peak == 0, 1.0)
    total = sizes.sum(dim=1, keepdim=True)
    vector = (pulses * sizes / total.masked_fill(total == 0, 1.0)).floor()
    # Rounding may have pushed a sum over the pulses: at most by one.
    vector[:, 0] = vector[:, 0].where(total[:, 0] > 0, float(pulses))
    over = vector.sum(dim=1) > pulses
    vector[over] -= torch.nn.functional.one_hot(vector[over].argmax(1), vector.shape[1])
    product = (sizes * vector).sum(dim=1)
    square = vector.square().sum(dim=1)
    short = torch.arange(len(vector))[vector.sum(dim=1) < pulses]
    while len(short):
        gain = (product[short, None] + sizes[short]).square()
        gain /= square[short, None] + 2 * vector[short] + 1
        at = gain.argmax(dim=1)
        product[short] += sizes[short, at]
        square[short] += 2 * vector[short, at] + 1
        vector[short, at] += 1
        short = short[vector[short].sum(dim=1) < pulses]
    signed = vector.where(values >= 0, -vector)
    length = (values * signed).sum(dim=1) / torch.linalg.vector_norm(vector, dim=1)
    return signed, length


def _factor(
    gram: Float[Tensor, "in in"], damping: float
) -> tuple[Float[Tensor, "in in"], tuple[str, ...]]:
    """U, upper triangular, such that the damped H^-1 = U^T U, and a note if it took more."""
    hessian = gram.double()
    diagonal = hessian.diagonal()
    live = diagonal[diagonal > 0]
    energy = float(live.mean()) if len(live) else 1.0
    # Reversing both axes turns the lower factor of H into an upper one, H = R R^T, and U = R^-1.
    turned, eye = hessian.flip(0, 1), torch.eye(len(hessian), dtype=torch.float64)
    for power in range(_TRIES):
        used = damping * 10**power
        lower, failed = cast(
            "tuple[Tensor, Tensor]", torch.linalg.cholesky_ex(turned + used * energy * eye)
        )
        if not failed:
            note = f"damping raised to {used:g}, for a gram matrix not positive definite"
            factor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            return factor, (note,) * bool(power)
    raise UserError(
        f"the gram matrix does not factor, even with damping {damping * 10 ** (_TRIES - 1):g}.",
        "Give a higher damping, or switch feedback off.",
    )


def _spheres(width: int, group: int, bits: int) -> list[_Sphere]:
    """The sphere of each group of a row.

    Raises:
        UserError: The width of a code, or a group, is beyond the tables.
    """
    group = min(group, width)
    if group > _MOST_GROUP or bits > _MOST_BITS:
        raise UserError(
            f"bits is {bits} in groups of {group}.",
            f"Give bits from 1 to {_MOST_BITS} and a group of at most {_MOST_GROUP}: there is a "
            "number for every direction.",
        )
    whole, rest = divmod(width, group)
    return [_sphere(group, bits)] * whole + ([_sphere(rest, bits)] if rest else [])


@functools.cache
def _sphere(entries: int, bits: int) -> _Sphere:
    """The sphere with the most pulses whose directions have at most so many bits an entry."""
    most = 2 ** (bits * entries)
    # Column by column: how many vectors of 0, 1 .. `entries` entries sum to k.
    column = [1] * (entries + 1)
    columns = [column]
    while True:
        following = [0]
        for n in range(1, entries + 1):
            following.append(following[n - 1] + column[n] + column[n - 1])
        # A single entry has a sign and nothing else, whatever its pulses.
        if following[entries] > most or following[entries] == column[entries]:
            break
        columns.append(following)
        column = following
    counts = [[one[n] for one in columns] for n in range(entries + 1)]
    before: list[list[int]] = []
    for row in counts:
        sums = [0]
        for count in row:
            sums.append(sums[-1] + 2 * count)
        before.append(sums)
    return _Sphere(len(columns) - 1, (column[entries] - 1).bit_length(), counts, before)


def _index(vector: Sequence[int], sphere: _Sphere) -> int:
    """The number of a vector: larger first entries come first, and a positive one before -."""
    number, left = 0, sphere.pulses
    for rest, entry in zip(range(len(vector) - 1, -1, -1), vector, strict=True):
        left -= abs(entry)
        number += sphere.before[rest][left]
        if entry < 0:
            number += sphere.counts[rest][left]
    return number


def _entries(number: int, entries: int, sphere: _Sphere) -> list[int]:
    """The vector of a number."""
    vector: list[int] = []
    left = sphere.pulses
    for rest in range(entries - 1, 0, -1):
        after = bisect_right(sphere.before[rest], number, 0, left + 1) - 1
        number -= sphere.before[rest][after]
        entry, left = left - after, after
        if entry and number >= sphere.counts[rest][after]:
            number -= sphere.counts[rest][after]
            entry = -entry
        vector.append(entry)
    return [*vector, -left if number else left]
