"""JLCM: codebooks of groups of rows, whose values and codes are learned together."""

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from layerwise.core.activation import Activation
from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.learning import Learned, Schedule, learned_alone
from layerwise.core.packing import pack, unpack, words
from layerwise.core.results import SCALE_BITS, SCALE_DTYPE, Coded, Layout
from layerwise.core.statistics import check_statistics
from layerwise.core.verbs import quantizer
from layerwise.quantize._rounding import check_schedule

_MOST_BITS, _MOST_BOOKS = 8, 256
_LLOYD = 50  # steps of k-means, at most
# A weight that lies on a value has logits so far below 0 for the values beside it.
_PEAK = 8.0
# The logit of a value that there is not.
_NEVER = -1e30
# Rates of values, in median gaps between them, and of logits.
_VALUE_RATE, _LOGIT_RATE = 1e-2, 0.1

_SOURCE = "abstract: at equal accuracy, models smaller than those of uniform codes"
_ROWS = {"group": 0}


@dataclass(frozen=True, slots=True)
class Codebooks(Coded):
    """A weight as codes into a book of values, one of a few books for each row.

    Attributes:
        codes: Which value of its row's book each weight has.
        book: The book of each row.
        values: What the codes of each book stand for, ascending, in SCALE_DTYPE.
        bits: Width of a code.
        input_scale: None.
        activation: How the layer's input is rounded; None leaves it.
        notes: What the caller should know.
    """

    codes: Integer[Tensor, "out in"]
    book: Integer[Tensor, " out"]
    values: Float[Tensor, "books codes"]
    bits: int
    input_scale: Float[Tensor, " in"] | None = None
    activation: Activation | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def layout(cls, rows: int, width: int, told: Mapping[str, Any]) -> Layout:
        """Packed codes, the number of each row's book, and the books."""
        bits = int(told["bits"])
        return {
            "codes": (torch.int32, (rows, words(width, bits))),
            "book": (torch.uint8, (rows,)),
            "values": (SCALE_DTYPE, (min(int(told["books"]), rows), 2**bits)),
        }

    @classmethod
    def taken(cls, rows: int, width: int, told: Mapping[str, Any]) -> int:
        """Bytes of all that, but for what only fills up words."""
        dtype, shape = cls.layout(rows, width, told)["values"]
        return -(-rows * width * int(told["bits"]) // 8) + rows + dtype.itemsize * math.prod(shape)

    def parts(self, told: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those tensors."""
        return {"codes": pack(self.codes, self.bits), "book": self.book, "values": self.values}

    @classmethod
    def read(
        cls, parts: Mapping[str, Tensor], rows: int, width: int, told: Mapping[str, Any]
    ) -> "Codebooks":
        """What `parts` gave, but for notes and activations."""
        bits = int(told["bits"])
        codes = unpack(parts["codes"], bits, width).to(torch.uint8)
        return cls(codes, parts["book"], parts["values"], bits)

    def grid_values(self) -> Float[Tensor, "out in"]:
        """The stored matrix, float32."""
        return self.values.float()[self.book.long()[:, None], self.codes.long()]

    def bits_per_weight(self) -> float:
        """Codes, 8 bits for each row's book, and the books, per weight."""
        stored = self.codes.numel() * self.bits + 8 * len(self.book)
        return (stored + self.values.numel() * SCALE_BITS) / self.codes.numel()


class JointlyLearned(Learned):
    """A layer whose books and codes are being learned; the arguments are those of `jlcm`.

    Attributes:
        reach: How far a code may move, in places of its book.
    """

    reach = 1

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        gram: Float[Tensor, "in in"] | None = None,
        *,
        bits: int,
        group: int = 0,
        symmetric: bool = False,
        books: int = 4,
        steps: int = 200,
        batch: int = 8,
    ) -> None:
        _check(weight, bits, group, books, steps, batch)
        self.bits = bits
        self.schedule = Schedule(steps, batch, "adam", "cosine")
        target = weight.float()
        self.book = _books(target, books)  # (out,)
        count = min(books, len(target))
        zero = torch.stack([(target[self.book == n] == 0).any() for n in range(count)])
        found = [
            _means(target[self.book == n].flatten(), 2**bits, pinned=bool(zero[n]))
            for n in range(count)
        ]
        start = torch.stack(found)  # (books, codes)
        self.gap = _gap(start)  # (books, 1)
        # 0.0 where a pinned value stays, else the side of 0.0 that a value stays on; NaN for any.
        self.side = start.sign().where(zero[:, None], torch.nan)
        self.learned = (start / self.gap).requires_grad_()
        stored = self._stored().detach()
        centre = torch.stack(
            [_nearest(row, stored[n]) for row, n in zip(target, self.book.tolist(), strict=True)]
        )
        offsets = [0, *(way * n for n in range(1, self.reach + 1) for way in (-1, 1))]
        places = torch.stack([centre + offset for offset in offsets])  # (near, out, in)
        there = (places >= 0) & (places < 2**bits)
        # A weight of 0.0 whose book has that value keeps it.
        there[1:] &= ~((target == 0) & zero[self.book, None])
        self.places = places.clamp(0, 2**bits - 1)
        self.logits = self._first(target, stored, there).requires_grad_()

    def parameters(self) -> dict[float, list[Tensor]]:
        """The values of all books, in gaps between them, and the logits of codes."""
        return {_VALUE_RATE: [self.learned], _LOGIT_RATE: [self.logits]}

    def settle(self) -> None:
        """Values stay in order, and those that are pinned at 0.0, or beside it, where they are."""
        with torch.no_grad():
            low, high = self.learned.clamp(max=0), self.learned.clamp(min=0)
            kept = self.learned.where(~(self.side < 0), low).where(~(self.side > 0), high)
            self.learned.copy_(kept.masked_fill(self.side == 0, 0.0).cummax(dim=1).values)

    def weight(self) -> Float[Tensor, "out in"]:
        """What the present codes stand for; logits see the slope of the method, not one of it."""
        near = self._near(self._stored())  # (near, out, in)
        chosen = near.gather(0, self.logits.argmax(dim=0, keepdim=True))[0]  # (out, in)
        with torch.no_grad():
            slopes = self._slopes(self.logits.softmax(dim=0), near - chosen)
        pull = (self.logits * slopes).sum(dim=0)
        return chosen + (pull - pull.detach())

    def coded(self) -> Codebooks:
        """The present codes and books."""
        with torch.no_grad():
            codes = self.places.gather(0, self.logits.argmax(dim=0, keepdim=True))[0]
            values = self._stored().to(SCALE_DTYPE)
        return Codebooks(codes.to(torch.uint8), self.book.to(torch.uint8), values, self.bits)

    def _slopes(
        self, shares: Float[Tensor, "near out in"], distance: Float[Tensor, "near out in"]
    ) -> Float[Tensor, "near out in"]:
        """The change of a weight for each of its logits, by the logits' softmax."""
        gap = self.gap[self.book]  # (out, 1)
        return shares * distance.sign() * gap.square() / (distance.abs() + gap)

    def _stored(self) -> Float[Tensor, "books codes"]:
        """The values as they are stored; gradients pass."""
        values = self.learned * self.gap
        return values.to(SCALE_DTYPE).float().detach() + (values - values.detach())

    def _near(self, stored: Float[Tensor, "books codes"]) -> Float[Tensor, "near out in"]:
        return stored[self.book[:, None], self.places]

    def _first(
        self,
        target: Float[Tensor, "out in"],
        stored: Float[Tensor, "books codes"],
        there: Tensor,
    ) -> Float[Tensor, "near out in"]:
        """Logits whose greatest is of the nearest value."""
        near = self._near(stored)
        away = near - near[0]
        # By how much nearer the middle is than each other, as a share of the way there.
        nearer = (target - near[0]) / away.masked_fill(away == 0, 1.0)
        logits = _PEAK * (2 * nearer - 1) * (away != 0)
        # Of values that are farther away, none is the nearest.
        steps = torch.arange(1, len(near)).add(1).div(2, rounding_mode="floor")
        logits[1:] *= steps[:, None, None].square()
        there[1:] &= away[1:] != 0
        return logits.masked_fill(~there, _NEVER)


@quantizer(
    Paper(
        "Network Memory Footprint Compression Through Jointly Learnable Codebooks and Mappings",
        2023,
        "2309.17361",
    ),
    claims=(
        Claim("rtn", "bytes-wikitext/quantize", _ROWS | {"bits": 3}, 0.3, _SOURCE),
        Claim("rtn", "bytes-wikitext/quantize", _ROWS | {"bits": 4}, 0.3, _SOURCE),
        Claim("signround", "bytes-wikitext/quantize", _ROWS | {"bits": 3}, 0.0, _SOURCE),
    ),
    codes="own",
    widths=range(1, _MOST_BITS + 1),
    stores=Codebooks,
    learns=JointlyLearned,
    unit="block",
)
def jlcm(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    bits: int,
    group: int = 0,
    symmetric: bool = False,
    books: int = 4,
    steps: int = 200,
    batch: int = 8,
) -> Coded:
    """Give rows of like size a book of 2^bits values, and learn values and codes together.

    Rows sorted by mean |w| are cut into `books` equal parts.  Each part has a book C of its own,
    which k-means of the part's weights begins; the code a of a weight is of the nearest value.
    Then both are moved by Adam so that the block answers as it did.  With logits Z for the value
    that a weight began at and the two beside it, p = softmax(Z):

        w' = C[argmax Z]
        dL/dC_c  = sum of dL/dw' over the weights whose code is c
        dw'/dZ_c = p_c sign(C_c - w') g^2 / (|C_c - w'| + g)                 proximal

    where the usual dw'/dZ_c = p_c (C_c - w') would push a code the harder the farther it had to
    jump.  g is the median gap between the values of a book.  A weight t of the way from its value
    to one beside it begins with Z = 8 (2 t - 1) for that, and 0 for its own.

    The paper's text leaves the formulas open: that the slope decreases with distance is its own,
    these are ours, as is the window of three values in the place of all.  Within it the two slopes
    have one sign, and Adam divides by their size: on trained layers they end within 3% of each
    other.  Unlike the paper, rows
    stay where they are and each says which book it has, in 8 bits, which is less than where it
    was before it was moved.  A book of rows that hold exact zeros has 0.0 for a value, and those
    weights keep it.

    Args:
        weight: Layer to quantize.
        gram: Mean of x x^T over calibration tokens; of use where the layer is learned alone.
        bits: Width of a code, from 1 to 8.
        group: Not used: a book serves whole rows.
        symmetric: Store no zero points; none are stored either way.
        books: Books of a layer, at most one for each row; each takes 2^bits values of 16 bits.
        steps: Updates; 0 is k-means, which needs no data.
        batch: Windows that each update sees.

    Returns:
        Codes and books.

    Raises:
        UserError: An option is out of range, or a value is NaN or infinite.
    """
    check_statistics(gram)
    layer = JointlyLearned(
        weight, bits=bits, group=group, symmetric=symmetric, books=books, steps=steps, batch=batch
    )
    return learned_alone(layer, weight, gram)


def _check(weight: Tensor, bits: int, group: int, books: int, steps: int, batch: int) -> None:
    if not 1 <= bits <= _MOST_BITS or group < 0:
        raise UserError(
            f"bits is {bits}, group is {group}.",
            f"Give bits from 1 to {_MOST_BITS}, a group of 0 or more.",
        )
    if not 1 <= books <= _MOST_BOOKS:
        raise UserError(f"books is {books}.", f"Give from 1 to {_MOST_BOOKS} books.")
    check_schedule(steps, batch)
    if not weight.numel():
        raise UserError(f"the weight is empty, {tuple(weight.shape)}.", "Leave the layer out.")
    if not weight.isfinite().all():
        raise UserError(
            "the weight holds NaN or infinity.", "Repair the checkpoint or leave the layer out."
        )


def _books(weight: Float[Tensor, "out in"], books: int) -> Integer[Tensor, " out"]:
    """The book of each row: equal parts of the rows, by their mean magnitude."""
    order = weight.abs().mean(dim=1, dtype=torch.float64).argsort(stable=True)
    parts = torch.arange(len(order)) * min(books, len(order)) // len(order)
    return torch.empty_like(order).scatter(0, order, parts)


def _means(
    values: Float[Tensor, " entries"], count: int, *, pinned: bool
) -> Float[Tensor, " codes"]:
    """So many means of numbers, ascending; 0.0 among them if it is pinned.

    What k-means begins with are the parts of numbers that are cut in two at their mean as long as
    there are too few, the one with the most error first.  If there are fewer numbers than means,
    the last one is there more than once.
    """
    ordered = values.double().sort().values
    sums = _sums(ordered)
    means = _split(ordered[ordered != 0] if pinned else ordered, count - pinned)
    if pinned:
        means = torch.cat([means, torch.zeros(1, dtype=torch.float64)]).sort().values
    zero = int((means == 0).nonzero()[0]) if pinned else None
    for _ in range(_LLOYD):
        cuts = torch.searchsorted(ordered, (means[1:] + means[:-1]) / 2)
        ends = torch.cat([torch.zeros(1, dtype=torch.long), cuts, torch.tensor([len(ordered)])])
        counts = ends.diff()
        moved = (sums[ends].diff() / counts.clamp(min=1)).where(counts > 0, means)
        if zero is not None:
            moved[zero] = 0.0
        if moved.equal(means):
            break
        means = moved
    return means.float()


def _split(ordered: Float[Tensor, " entries"], count: int) -> Float[Tensor, " codes"]:
    """The means of so many parts of ascending numbers."""
    if not len(ordered):
        return torch.zeros(count, dtype=ordered.dtype)
    sums, squares = _sums(ordered), _sums(ordered.square())

    def part(start: int, stop: int) -> tuple[float, int, int]:
        error = (
            squares[stop] - squares[start] - (sums[stop] - sums[start]).square() / (stop - start)
        )
        return -float(error), start, stop

    left, whole = [part(0, len(ordered))], list[tuple[int, int]]()
    while left and len(left) + len(whole) < count:
        _, start, stop = heapq.heappop(left)
        mean = (sums[stop] - sums[start]) / (stop - start)
        cut = start + int(torch.searchsorted(ordered[start:stop], mean))
        if start < cut < stop:
            heapq.heappush(left, part(start, cut))
            heapq.heappush(left, part(cut, stop))
        else:
            whole.append((start, stop))
    ends = sorted([*whole, *((start, stop) for _, start, stop in left)])
    means = torch.stack([(sums[stop] - sums[start]) / (stop - start) for start, stop in ends])
    return torch.cat([means, means[-1:].expand(count - len(means))])


def _sums(values: Float[Tensor, " entries"]) -> Float[Tensor, " _"]:
    """The sum of the first n numbers, from none to all."""
    return torch.cat([torch.zeros(1, dtype=values.dtype), values.cumsum(0)])


def _gap(values: Float[Tensor, "books codes"]) -> Float[Tensor, "books 1"]:
    """The median gap between the values of each book; of a single one, its size, or 1."""
    found: list[Tensor] = []
    for book in values:
        gaps = book.diff()
        gaps = gaps[gaps > 0] if (gaps > 0).any() else book.abs().amax()[None]
        gap = gaps.median()
        found.append(gap.where(gap > 0, 1.0))
    return torch.stack(found)[:, None]


def _nearest(
    values: Float[Tensor, " entries"], book: Float[Tensor, " codes"]
) -> Integer[Tensor, " entries"]:
    """The place of the nearest value of an ascending book."""
    return torch.bucketize(values.contiguous(), (book[1:] + book[:-1]) / 2)
