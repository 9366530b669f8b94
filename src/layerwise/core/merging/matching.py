"""Permutations that bring one network's units to another's."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float64, Int64
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor

from layerwise.core.reading.symmetry import Symmetry

State = Mapping[str, Tensor]
_SWEEPS = 100
# Least gain of a sweep, as a fraction of what matches, for which another one is made.
_GAIN = 1e-12


def matched(
    first: State, second: State, symmetries: Sequence[Symmetry], seed: int = 0
) -> dict[str, Int64[Tensor, " _"]]:
    """For each symmetry, which unit of the second network comes in each place of the first's.

    Coordinate descent: one symmetry after the other, in an order drawn anew for each sweep, is
    given the permutation that is best with all others as they are,

        max over P of sum over its tensors of <W_1, P(W_2)>

    an assignment problem, until a sweep gains nothing.
    """
    found = {one.name: torch.arange(one.units(first)) for one in symmetries}
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_SWEEPS):
        better = False
        for place in torch.randperm(len(symmetries), generator=generator).tolist():
            one = symmetries[place]
            others = [other for other in symmetries if other is not one]
            likeness = _likeness(first, second, one, others, found)
            rows, columns = linear_sum_assignment(likeness.numpy(), maximize=True)
            order = torch.from_numpy(np.asarray(columns, dtype=np.int64))
            before = float(likeness[torch.arange(len(order)), found[one.name]].sum())
            after = float(likeness[torch.from_numpy(np.asarray(rows)), order].sum())
            if after > before + _GAIN * (1 + abs(before)):
                found[one.name], better = order, True
        if not better:
            break
    return found


def likenesses(
    first: State,
    second: State,
    symmetries: Sequence[Symmetry],
    found: Mapping[str, Int64[Tensor, " _"]],
) -> dict[str, Float64[Tensor, " _"]]:
    """How alike each unit of the first network is to the one that takes its place."""
    made: dict[str, Tensor] = {}
    for one in symmetries:
        others = [other for other in symmetries if other is not one]
        order = found[one.name]
        made[one.name] = _likeness(first, second, one, others, found)[
            torch.arange(len(order)), order
        ]
    return made


def _likeness(
    first: State,
    second: State,
    one: Symmetry,
    others: Sequence[Symmetry],
    found: Mapping[str, Int64[Tensor, " _"]],
) -> Float64[Tensor, "units units"]:
    """How alike each unit of the first is to each of the second, all else being permuted."""
    units = len(found[one.name])
    total = torch.zeros(units, units, dtype=torch.float64)
    for name, axis in one.axes.items():
        moved = permuted(name, second[name], others, found)
        left, right = (
            tensor.double().movedim(axis, 0).reshape(units, -1) for tensor in (first[name], moved)
        )
        total += left @ right.T
    return total


def permuted(
    name: str,
    tensor: Tensor,
    symmetries: Sequence[Symmetry],
    found: Mapping[str, Int64[Tensor, " _"]],
) -> Tensor:
    """A tensor with its units in the places that were found for them."""
    for one in symmetries:
        if name in one.axes:
            size = one.entries(name)
            order = found[one.name][:, None] * size + torch.arange(size)  # (units, size)
            tensor = tensor.index_select(one.axes[name], order.reshape(-1))
    return tensor
