"""Figures of whole tensors that are read in slices: the same bits whatever the slices are.

What is counted is counted in whole numbers.  What is added is added in one fixed order, entry by
entry, so that neither the slices nor the width of a processor's registers show in a sum.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

# Entries that are folded into one number at a time; a power of two.
BLOCK = 1 << 16
_LOW = 16  # bits of a float32 that are looked at in the second reading
_SPAN = 1 << _LOW

Parts = Callable[[], Iterable[Float[Tensor, "sets _"]]]


def cuts(parts: Parts, kept: Sequence[int]) -> Float[Tensor, " sets"]:
    """The magnitude of the `kept`-th largest entry of each set, from two readings.

    The bits of a positive float32, read as a whole number, have the order of the floats.  The
    first reading counts how often each value of the upper 16 bits is there, which says in which of
    these the entry lies; the second counts the lower 16 bits of those.

    Args:
        parts: Gives slices of the sets, float32 and finite, from the beginning each time.
        kept: Rank of the entry wanted in each set.

    Returns:
        For each set: infinity where nothing is kept, 0 where everything is.
    """
    high = [torch.zeros(1 << (31 - _LOW), dtype=torch.long) for _ in kept]
    for part in parts():
        for counts, bits in zip(high, _bits(part), strict=True):
            counts.add_(torch.bincount(bits >> _LOW, minlength=len(counts)))
    sizes = [int(counts.sum()) for counts in high]
    found = [_from_top(counts, rank) for counts, rank in zip(high, kept, strict=True)]
    low = [torch.zeros(_SPAN + 2, dtype=torch.long) for _ in kept]
    for part in parts():
        for counts, bits, (bucket, _) in zip(low, _bits(part), found, strict=True):
            # What lies in lower and in higher buckets falls to both ends.
            inside = (bits - ((bucket << _LOW) - 1)).clamp_(0, _SPAN + 1)
            counts.add_(torch.bincount(inside, minlength=len(counts)))
    values: list[float] = []
    for counts, (bucket, rank), wanted, size in zip(low, found, kept, sizes, strict=True):
        within, _ = _from_top(counts[1:-1], rank)
        exact = torch.tensor([(bucket << _LOW) + within], dtype=torch.int32)
        value = float(exact.view(torch.float32))
        values.append(math.inf if wanted == 0 else 0.0 if wanted >= size else value)
    return torch.tensor(values)


def _bits(part: Float[Tensor, "sets _"]) -> Iterator[Tensor]:
    for row in part:
        yield row.abs().view(torch.int32)


def _from_top(counts: Tensor, rank: int) -> tuple[int, int]:
    """Where the entry of a rank lies, counted from the highest value, and its rank in there."""
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, min(max(rank, 1), int(above[-1]))))
    before = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, max(rank, 1) - before


def products(parts: Iterable[Float[Tensor, "sets _"]], sets: int) -> Float64[Tensor, "sets sets"]:
    """Inner products of all pairs of sets, in float64.

    Products of float32 are exact there.  Each block of 65,536 is folded in halves, and what the
    blocks come to is added without any rounding but the last.

    Args:
        parts: Slices of the sets, float32.
        sets: How many there are.
    """
    pairs = [(left, right) for left in range(sets) for right in range(left, sets)]
    sums: dict[tuple[int, int], list[float]] = {pair: [] for pair in pairs}
    for block in _blocks(parts):
        wide = block.double()
        for left, right in pairs:
            sums[left, right].append(_folded(wide[left] * wide[right]))
    made = torch.zeros(sets, sets, dtype=torch.float64)
    for (left, right), found in sums.items():
        made[left, right] = made[right, left] = math.fsum(found)
    return made


def _blocks(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same entries, BLOCK at a time."""
    left: Tensor | None = None
    for part in parts:
        joined = part if left is None else torch.cat([left, part], dim=1)
        whole = joined.shape[1] // BLOCK * BLOCK
        yield from joined[:, :whole].split(BLOCK, dim=1) if whole else ()
        # A slice may lie in room that the next one is put into.
        left = joined[:, whole:].clone() if whole < joined.shape[1] else None
    if left is not None:
        yield left


def _folded(values: Float64[Tensor, " _"]) -> float:
    """Their sum, added in halves; adding is done entry by entry, so that its order is known."""
    size = len(values)
    while size > 1:
        half = 1 << (size - 1).bit_length() - 1
        head = values[: size - half] + values[half:]
        values = torch.cat([head, values[size - half : half]])
        size = half
    return float(values[0]) if size else 0.0
