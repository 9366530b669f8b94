"""BAQ: as many points for each input as makes all of them lose alike."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.nn import functional

from layerwise.core.activation import Activation
from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.packing import WORD, pack, unpack, words
from layerwise.core.results import SCALE_BITS, SCALE_DTYPE, Coded, Layout, spread, told_group
from layerwise.core.verbs import quantizer
from layerwise.quantize._feedback import Factored, factorize, feed_back
from layerwise.quantize._grid import by_group, check_grid, storable

# The most bits of a column; its points are counted in 16.
_MOST_BITS = 14
# Runs of codes begin a word each, one for each number of points that is a power of two.
_SLACK = _MOST_BITS + 1
_HALVINGS = 50

_UNCLIPPED = {"quantize/gptq": {"clips": 1}}
_THREE = {"bits": 3, "group": 0, "options": _UNCLIPPED}
_TWO = {"bits": 2, "group": 0, "options": _UNCLIPPED}
_ANY = {"bits": 3, "group": 0, "options": _UNCLIPPED | {"quantize/baq": {"real": True}}}
_SOURCE = "abstract: up to 56 times less perplexity than GPTQ at equal bits, OPT"


@dataclass(frozen=True, slots=True)
class Allotted(Coded):
    """A weight as codes of which each column has its own number.

    Attributes:
        codes: Grid points, from 0 to one below the number of the column.
        levels: Points of each column; 1 for one of zeros.
        low: Least value of each group, in SCALE_DTYPE, at most 0.0.
        high: Greatest, at least 0.0.
        bits: What a code takes on average.
        group: Inputs per range; the last group of a row may be shorter.
        symmetric: Ranges are as wide on both sides of 0.0, and one end is stored.
        input_scale: None.
        activation: How the layer's input is rounded when the model runs; None leaves it.
        notes: What the caller should know.
    """

    codes: Integer[Tensor, "out in"]
    levels: Integer[Tensor, " in"]
    low: Float[Tensor, "out groups"]
    high: Float[Tensor, "out groups"]
    bits: int
    group: int
    symmetric: bool = False
    input_scale: Float[Tensor, " in"] | None = None
    activation: Activation | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def layout(cls, rows: int, width: int, told: Mapping[str, Any]) -> Layout:
        """Room for the average of bits, and for the words that runs of codes begin."""
        ranges = (rows, -(-width // told_group(told, width)))
        made: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (torch.int32, (words(rows * width, int(told["bits"])) + _SLACK,)),
            "levels": (torch.int16, (width,)),
            "high": (SCALE_DTYPE, ranges),
        }
        if not told["symmetric"]:
            made["low"] = (SCALE_DTYPE, ranges)
        return made

    def parts(self, told: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those tensors; codes lie by number of points, then column after column."""
        runs = [
            _packed(self.codes[:, columns].T.reshape(-1), levels)
            for levels, columns in _runs(self.levels)
        ]
        filled = torch.cat([*runs, torch.zeros(0, dtype=torch.int32)])
        room = words(self.codes.numel(), self.bits) + _SLACK
        made = {
            "codes": functional.pad(filled, (0, room - len(filled))),
            "levels": self.levels.to(torch.int16),
            "high": self.high,
        }
        return made if self.symmetric else made | {"low": self.low}

    @classmethod
    def read(
        cls, parts: Mapping[str, Tensor], rows: int, width: int, told: Mapping[str, Any]
    ) -> "Allotted":
        """What `parts` gave, but for notes and activations."""
        levels = parts["levels"].int()
        codes = torch.zeros(rows, width, dtype=torch.int32)
        start = 0
        for count, columns in _runs(levels):
            entries = rows * len(columns)
            stop = start + _run_words(entries, count)
            run = _unpacked(parts["codes"][start:stop], entries, count)
            codes[:, columns] = run.reshape(len(columns), rows).T
            start = stop
        high = parts["high"]
        return cls(
            codes,
            levels,
            parts.get("low", -high),
            high,
            int(told["bits"]),
            told_group(told, width),
            bool(told["symmetric"]),
        )

    def grid_values(self) -> Float[Tensor, "out in"]:
        """The stored matrix, float32."""
        width = self.codes.shape[1]
        low, high = (spread(end.float(), self.group, width) for end in (self.low, self.high))
        step, zero = _steps(low, high, self.levels, self.symmetric)
        return (self.codes - zero) * step

    def bits_per_weight(self) -> float:
        """The room of the codes, numbers of points, and 16-bit ends of ranges, per weight."""
        count, ends = self.codes.numel(), 1 if self.symmetric else 2
        room = (words(count, self.bits) + _SLACK) * WORD
        stored = room + len(self.levels) * 16 + self.high.numel() * ends * SCALE_BITS
        return stored / count


@quantizer(
    Paper(
        "BAQ: Efficient Bit Allocation Quantization for Large Language Models", 2025, "2506.05664"
    ),
    claims=(
        Claim("gptq", "bytes-wikitext/quantize", _THREE, 0.0, _SOURCE),
        Claim("gptq", "bytes-wikitext/quantize", _ANY, 0.0, _SOURCE),
        Claim("gptq", "bytes-wikitext/quantize", _TWO, 0.0, _SOURCE),
    ),
    exempt={
        "pruned_weights_stay_zero": "a zero moves to absorb the errors of its row",
        "each_bit_quarters_the_loss": "a column that chance lets lose nothing in the first pass "
        "gets no bits in the second",
    },
    codes="own",
    widths=range(1, 9),
    stores=Allotted,
)
def baq(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    bits: int,
    group: int = 128,
    symmetric: bool = False,
    real: bool = False,
    theta: float = 1.95,
    damping: float = 0.01,
) -> Allotted:
    """Give each input as many points as makes all inputs lose alike, at `bits` on average.

    With error feedback (see quantize/gptq), column j loses l_j = sum of e_j^2 / 2, which falls as
    2^(-theta R_j) with its bits R_j.  The sum of all is least, at a given sum of bits, where

        R_j = R + (log2 l_j - mean log2 l) / theta

    that is, where all columns lose alike.  The losses are those of a first pass with 2^R points
    in each column; a second pass rounds with the points so found:

        s_j = (max - min) / (n_j - 1),    zero = round(-min / s_j)

    A range is that of its group when its first column is reached: with one group, that of the row
    as given.  A column of one point is 0.0.  Widths are whole numbers of bits, handed out one by
    one to the column that gains most by another, until bits * in are spent.  With `real`,
    n_j = round(2^R_j) may be any number, and codes of a column are digits of numbers to that
    base, as many as 64 bits hold; all n_j are lowered or raised together until that fills the
    same room.

    Unlike the paper, which reports bits that no storage could have, what we compare at is what is
    stored, and a note says both.  Unlike the authors' code, both passes see the inputs that
    earlier layers leave after their own second pass, and ranges may be those of groups.  Unlike
    the authors' code, an input that calibration never saw gets no bits, and no part in the mean.

    Args:
        weight: Layer to quantize.
        gram: Mean of x x^T over calibration tokens.
        bits: Width of a code on average, from 1 to 8.
        group: Inputs that share a range; in the paper it is the whole row.
        symmetric: Centre every range on 0.0, and store one end of it.
        real: Let a column have any number of points, not powers of two only.
        theta: How fast a loss falls with bits: 2 in theory.
        damping: Added to the diagonal of `gram`, as a fraction of its mean over live inputs.

    Returns:
        Codes, points and ranges.  Notes say what the points are worth in bits.

    Raises:
        UserError: An option is out of range, a value is NaN or infinite, or H does not factor.
    """
    if bits not in range(1, 9):
        raise UserError(f"bits is {bits}.", "Give an average from 1 to 8.")
    if not 0 < theta < torch.inf:
        raise UserError(f"theta is {theta}.", "Give a finite number above 0.")
    check_grid(weight, bits, group)
    factored = factorize(gram, damping)
    rounder = _Columns(weight, group, symmetric)
    live = ~factored.dead if not bool(factored.dead.all()) else torch.ones_like(factored.dead)
    levels = torch.full((weight.shape[1],), 2**bits).where(live, 1)
    losses = _losses(weight, factored, rounder, levels)
    find = _any_levels if real else _whole_widths
    levels = find(losses, live, bits, theta, len(weight))
    _losses(weight, factored, rounder, levels)

    stored = sum(_run_words(len(weight) * len(c), n) for n, c in _runs(levels)) * WORD
    ideal = float(levels.double().log2().mean())
    notes = [f"points worth {ideal:.3f} bits, in {stored / weight.numel():.3f} of {bits}"]
    if unseen := int(factored.dead.sum()):
        notes.append(f"{unseen} inputs were always zero; no bits are spent on them")
    return Allotted(
        rounder.codes.T.contiguous(),
        levels.int(),
        rounder.low.to(SCALE_DTYPE),
        rounder.high.to(SCALE_DTYPE),
        bits,
        group,
        symmetric,
        notes=(*notes, *(note for note in factored.notes if "always zero" not in note)),
    )


class _Columns:
    """Rounds columns, each to its number of points, on ranges fitted when groups are reached."""

    def __init__(self, weight: Float[Tensor, "out in"], group: int, symmetric: bool) -> None:
        self.group, self.symmetric = group, symmetric
        self.low, self.high = _ends(weight, group, symmetric)
        self.levels: list[int] = []
        self.codes = torch.empty(weight.shape[1], len(weight), dtype=torch.int32)

    def fit(self, start: int, columns: Float[Tensor, "group out"]) -> None:
        """The range that holds all."""
        at, ends = start // self.group, _ends(columns.T, self.group, self.symmetric)
        self.low[:, at], self.high[:, at] = ends[0][:, 0], ends[1][:, 0]

    def round(self, j: int, column: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
        """The nearest points; their codes are kept."""
        at, count = j // self.group, self.levels[j]
        levels = torch.tensor([count])
        step, zero = _steps(self.low[:, at], self.high[:, at], levels, self.symmetric)
        codes = (column / step).round().add(zero).clamp(0, count - 1)
        self.codes[j] = codes.int()
        return (codes - zero) * step


def _losses(
    weight: Float[Tensor, "out in"],
    factored: Factored,
    rounder: _Columns,
    levels: Integer[Tensor, " in"],
) -> Float[Tensor, " in"]:
    """What each column loses when columns are rounded to so many points."""
    rounder.levels = levels.tolist()
    missed = feed_back(weight, factored, rounder, rounder.group)
    return missed.double().square().sum(dim=1) * factored.importance / 2


def _steps(
    low: Float[Tensor, "*range"],
    high: Float[Tensor, "*range"],
    levels: Integer[Tensor, " in"],
    symmetric: bool,
) -> tuple[Float[Tensor, "*range"], Float[Tensor, "*range"]]:
    """Steps and zero points; a single point is 0.0, and a range of nothing has the least step."""
    step = high / (levels - 1).clamp(min=1) - low / (levels - 1).clamp(min=1)
    step = step.clamp(min=torch.finfo(torch.float32).tiny)
    zero = (levels // 2).expand_as(step).float() if symmetric else (-low / step).round()
    return step, zero.where(levels > 1, 0.0)


def _whole_widths(
    losses: Float[Tensor, " in"], live: Bool[Tensor, " in"], bits: int, theta: float, rows: int
) -> Integer[Tensor, " in"]:
    """Powers of two: the bits * in steps, of one bit each, that gain most."""
    del rows
    gains = _bits_for(losses, theta)[:, None] - torch.arange(1, _MOST_BITS + 1)  # (in, bits)
    gains = gains.masked_fill(~live[:, None], -torch.inf)
    taken = torch.zeros(gains.numel(), dtype=torch.long)
    most = min(bits * len(losses), _MOST_BITS * int(live.sum()))
    taken[gains.flatten().argsort(descending=True, stable=True)[:most]] = 1
    return 2 ** taken.reshape(gains.shape).sum(dim=1)


def _any_levels(
    losses: Float[Tensor, " in"], live: Bool[Tensor, " in"], bits: int, theta: float, rows: int
) -> Integer[Tensor, " in"]:
    """The closed form, moved as a whole until the codes fill their room."""
    wanted = _bits_for(losses, theta)
    wanted = bits + wanted - wanted[live].mean()
    room = words(rows * len(losses), bits)
    low, high = -2.0 * _MOST_BITS - float(wanted.amax()), 2.0 * _MOST_BITS - float(wanted.amin())
    best = torch.ones(len(losses), dtype=torch.long)
    # The closed form as it stands is tried first, so that equal losses leave equal points.
    move = 0.0
    for _ in range(_HALVINGS):
        levels = (wanted + move).clamp(0, _MOST_BITS).exp2().round().long().where(live, 1)
        filled = sum(_run_words(rows * len(columns), n) for n, columns in _runs(levels))
        if filled <= room:
            best, low = levels, move
        else:
            high = move
        move = (low + high) / 2
    return best


def _bits_for(losses: Float[Tensor, " in"], theta: float) -> Float[Tensor, " in"]:
    # A column that loses nothing is one that loses next to nothing.
    return losses.clamp(min=torch.finfo(torch.float64).tiny).log2() / theta


def _ends(
    weight: Float[Tensor, "out width"], group: int, symmetric: bool
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """The least and the greatest value of each group, widened to hold 0.0."""
    grouped = by_group(weight, group)  # (out, groups, group)
    low, high = (-grouped.amin(dim=-1)).clamp(min=0), grouped.amax(dim=-1).clamp(min=0)
    if symmetric:
        low = high = torch.maximum(low, high)
    return -_outward(low), _outward(high)


def _outward(size: Float[Tensor, "*range"]) -> Float[Tensor, "*range"]:
    """Rounded up to 16 bits; 0.0 stays."""
    return storable(size).where(size > 0, 0.0)


def _runs(levels: Integer[Tensor, " in"]) -> Iterator[tuple[int, Integer[Tensor, " columns"]]]:
    """Columns by their number of points, ascending; those of one point hold nothing."""
    for count in levels.unique().tolist():
        if count > 1:
            yield count, (levels == count).nonzero().flatten()


def _digits(levels: int) -> int:
    """Digits to a base that 64 bits hold."""
    digits = 1
    while levels ** (digits + 1) <= 2**64:
        digits += 1
    return digits


def _run_words(entries: int, levels: int) -> int:
    """Words that a run of codes fills."""
    bits = levels.bit_length() - 1
    return words(entries, bits) if 2**bits == levels else 2 * -(-entries // _digits(levels))


def _packed(codes: Integer[Tensor, " entries"], levels: int) -> Integer[Tensor, " words"]:
    bits = levels.bit_length() - 1
    if 2**bits == levels:
        return pack(codes[None], bits)[0]
    digits = _digits(levels)
    filled = functional.pad(codes, (0, -len(codes) % digits)).numpy().astype(np.uint64)
    places = np.power(np.uint64(levels), np.arange(digits, dtype=np.uint64), dtype=np.uint64)
    numbers = (filled.reshape(-1, digits) * places).sum(axis=1, dtype=np.uint64)
    return torch.from_numpy(numbers.view(np.int32).copy())


def _unpacked(
    packed: Integer[Tensor, " words"], entries: int, levels: int
) -> Integer[Tensor, " entries"]:
    bits = levels.bit_length() - 1
    if 2**bits == levels:
        return unpack(packed[None], bits, entries)[0]
    digits = _digits(levels)
    numbers = packed.contiguous().numpy().view(np.uint64)
    places = np.power(np.uint64(levels), np.arange(digits, dtype=np.uint64), dtype=np.uint64)
    codes = (numbers[:, None] // places % np.uint64(levels)).astype(np.int32)
    return torch.from_numpy(codes.reshape(-1)[:entries].copy())
