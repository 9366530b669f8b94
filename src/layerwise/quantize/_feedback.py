"""Error feedback: round input by input, and let the inputs to come absorb each error."""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from layerwise.core.cholesky import upper_root
from layerwise.core.errors import UserError
from layerwise.core.results import Quantized
from layerwise.quantize._grid import by_group, check_grid, fit_clipped, pack

# Columns whose errors reach each other one by one; those of more go on in matrix products.
_FEW = 64
# Products of two numbers of so many bits, so many of them summed, fit the 53 bits of a float64.
_EXACT_BITS, _EXACT_TERMS = 22, 512
# Factors of second moments that are still there, by what was asked.
_KNOWN: MutableMapping[Tensor, dict[tuple[float, bool, int], "Factored"]] = (
    WeakTensorKeyDictionary()
)


@dataclass(frozen=True, slots=True)
class Factored:
    """What the second moments H of the inputs say of rounding them one by one.

    With R upper triangular and H = R R^T, R = (A + I) diag(R) where A is above its diagonal.

    Attributes:
        order: The inputs, in the order in which they are rounded.
        share: A in that order: how much of input i's error input j takes, i < j.
        importance: What a squared error costs, R_jj^2, in that order.
        dead: Inputs that were always zero, as they lie in the weight.
        notes: How many those are, and where damping was raised.
    """

    order: Int64[Tensor, " in"]
    share: Float[Tensor, "in in"]
    importance: Float[Tensor, " in"]
    dead: Bool[Tensor, " in"]
    notes: tuple[str, ...]


@runtime_checkable
class Rounder(Protocol):
    """Knows what columns are rounded to; fits its grids when their turn comes."""

    def fit(self, start: int, columns: Float[Tensor, "group out"]) -> None:
        """Fit what a group of columns is rounded to.

        Args:
            start: The place of its first column in the order of rounding.
            columns: As they had best be after what was rounded so far, one a row.
        """
        ...

    def round(self, j: int, column: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
        """What column j in the order of rounding becomes; each is asked for once, in turn."""
        ...


def factorize(gram: Float[Tensor, "in in"], damping: float, act_order: bool = False) -> Factored:
    """The factor of the damped second moments, in the order of rounding.

    It is kept as long as `gram` is, for the next layer that reads the same inputs.

    Args:
        gram: Mean of x x^T over calibration tokens.
        damping: Added to the diagonal, as a fraction of its mean over live inputs; ten times more,
            and a note, as often as H does not factor.
        act_order: Take inputs with the most energy first.

    Raises:
        UserError: The damping is no positive number, a value is NaN or infinite, or H does not
            factor.
    """
    asked = (damping, act_order, gram._version)
    known = _KNOWN.setdefault(gram, {})
    if asked not in known:
        known[asked] = _factorize(gram, damping, act_order)
    return known[asked]


def _factorize(gram: Float[Tensor, "in in"], damping: float, act_order: bool) -> Factored:
    order = torch.arange(len(gram))
    if act_order:  # a dead input as if it had the energy of the others
        order = _energies(gram).argsort(descending=True, stable=True)
    root = upper_root(gram, damping, order if act_order else None)
    dead = torch.empty_like(root.dead).index_copy_(0, order, root.dead)
    count = int(dead.sum())
    notes = (f"{count} inputs were always zero; rounded to nearest",) if count else ()
    diagonal = root.factor.diagonal().clone()
    share = root.factor.div_(diagonal).float()
    return Factored(order, share, diagonal.square().float(), dead, (*notes, *root.notes))


def _energies(gram: Float[Tensor, "in in"]) -> Float[Tensor, " in"]:
    diagonal = gram.diagonal().double()
    live = diagonal > 0
    return diagonal.where(live, diagonal[live].mean()) if bool(live.any()) else diagonal


def feed_back(
    weight: Float[Tensor, "out in"], factored: Factored, rounder: Rounder, group: int
) -> Float[Tensor, "in out"]:
    """Round one column after another, moving each error onto the columns to come.

        V_j = W_j + sum of (W_i - round(V_i)) A_ij over i < j
        e_j = V_j - round(V_j)

    The sum of e_j^2 R_jj^2 is the loss that is left, tr(E H E^T) of the damped H, E = W - round(V).
    This is GPTQ's update, which is written there with a factor of H^-1, and needs no inverse of H.
    Where a group G begins, its columns had best be W_G + P (A_GG + I)^-1, P the sum above as far as
    errors are known.

    Args:
        weight: Layer to round.
        factored: A and the order.
        rounder: Rounds columns.
        group: Columns that are fitted together when the first of them is reached; 0: none are.

    Returns:
        e_j, in the order of rounding.
    """
    # Columns as contiguous rows, in the order in which they are rounded.
    missed = weight.float().T[factored.order].contiguous()  # (in, out)
    left = missed.clone()
    _go_on(slice(0, len(left)), factored.share, missed, left, rounder, group)
    return left


def _go_on(
    columns: slice,
    share: Float[Tensor, "in in"],
    missed: Float[Tensor, "in out"],
    left: Float[Tensor, "in out"],
    rounder: Rounder,
    group: int,
) -> None:
    """Round some columns, given what those before have moved onto them.

    Args:
        columns: Which.
        share: A.
        missed: W - round(V) of columns that are done, W of others.
        left: e of columns that are done, V, as far as it is known, of others.
        rounder: Rounds columns.
        group: Columns that are fitted together.
    """
    start, stop = columns.start, columns.stop
    if stop - start > _FEW:
        middle = _middle(start, stop, group)
        first, second = slice(start, middle), slice(middle, stop)
        _go_on(first, share, missed, left, rounder, group)
        left[second] += _exact_product(share[first, second], missed[first])
        _go_on(second, share, missed, left, rounder, group)
        return
    for j in range(start, stop):
        if group and j % group == 0:
            fitted = slice(j, j + group)
            rounder.fit(j, _best(missed[fitted], left[fitted], share[fitted, fitted]))
        rounded = rounder.round(j, left[j])
        missed[j] -= rounded
        # One product, one sum: fused, they could round differently from row to row.
        left[j + 1 : stop] += share[j, j + 1 : stop, None] * missed[j]
        left[j] -= rounded


def _middle(start: int, stop: int, group: int) -> int:
    """Half way, at the end of a group if there is one: where one begins, all before it is done."""
    if not 0 < group < stop - start:
        return (start + stop) // 2
    middle = (start + stop) // 2 // group * group
    return middle if middle > start else middle + group


def _best(
    given: Float[Tensor, "group out"],
    left: Float[Tensor, "group out"],
    share: Float[Tensor, "group group"],
) -> Float[Tensor, "group out"]:
    """W_G + P (A_GG + I)^-1, where `left` is W_G + P."""
    if len(given) == 1 or left.equal(given):
        return left
    identity = torch.eye(len(given), dtype=torch.float64)
    unit = share.double().triu(1) + identity
    inverse = torch.linalg.solve_triangular(unit, identity, upper=True, unitriangular=True)
    return given + _exact_product(inverse.float(), left - given)


def round_evenly(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    bits: int,
    group: int,
    symmetric: bool,
    damping: float,
    act_order: bool = False,
    clips: int,
) -> Quantized:
    """Round to evenly spaced points with error feedback; see quantize/gptq for the equations.

    Raises:
        UserError: An option is out of range, a value is NaN or infinite, or H does not factor.
    """
    check_grid(weight, bits, group)
    if not 1 <= clips <= 100:
        raise UserError(f"clips is {clips}.", "Give clips from 1 to 100.")
    factored = factorize(gram, damping, act_order)
    rounder = _Even(weight, factored, _Grid(bits, group, symmetric, clips), act_order)
    feed_back(weight, factored, rounder, 0 if act_order else group)
    codes = torch.empty_like(rounder.codes).index_copy_(0, factored.order, rounder.codes)
    return pack(
        codes.T.contiguous(),
        rounder.scale.T.contiguous(),
        rounder.zero.T.contiguous(),
        width=len(codes),
        bits=bits,
        group=group,
        symmetric=symmetric,
        notes=factored.notes,
    )


@dataclass(frozen=True, slots=True)
class _Grid:
    bits: int
    group: int
    symmetric: bool
    clips: int

    def fit(
        self, weight: Float[Tensor, "out width"], importance: Float[Tensor, " width"], clips: int
    ) -> tuple[Float[Tensor, "groups out"], Float[Tensor, "groups out"]]:
        """Scales and zero points of groups, that lose least of `clips` ranges."""
        weights, importances = by_group(weight, self.group), by_group(importance[None], self.group)
        scale, zero = fit_clipped(weights, importances, self.bits, self.symmetric, clips)
        return scale.T.contiguous(), zero.T.contiguous()


class _Even:
    """Evenly spaced points, of grids that are fitted when reached, or, out of order, at first."""

    def __init__(
        self, weight: Float[Tensor, "out in"], factored: Factored, grid: _Grid, act_order: bool
    ) -> None:
        self.grid, self.importance = grid, factored.importance
        # Errors move in the order of rounding, groups lie in the order of the weight.
        in_place = torch.empty_like(self.importance)
        in_place.index_copy_(0, factored.order, self.importance)
        # Taken as they come, groups are fitted when they are reached; until then any will do.
        self.scale, self.zero = grid.fit(weight, in_place, grid.clips if act_order else 1)
        self.groups: list[int] = (factored.order // grid.group).tolist()
        self.top = 2**grid.bits - 1
        self.codes = torch.empty(weight.shape[1], len(weight))

    def fit(self, start: int, columns: Float[Tensor, "group out"]) -> None:
        """The range that loses least."""
        at, importance = self.groups[start], self.importance[start : start + len(columns)]
        scale, zero = self.grid.fit(columns.T, importance, self.grid.clips)
        self.scale[at], self.zero[at] = scale[0], zero[0]

    def round(self, j: int, column: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
        """The nearest point; its code is kept."""
        scale, zero = self.scale[self.groups[j]], self.zero[self.groups[j]]
        code = torch.div(column, scale, out=self.codes[j])
        code.round_().add_(zero).clamp_(0, self.top)
        return (code - zero).mul_(scale)


def _exact_product(
    share: Float[Tensor, "from to"], missed: Float[Tensor, "from out"]
) -> Float[Tensor, "to out"]:
    """share^T missed, to float32 accuracy and the same to the bit however it is summed.

    A matrix product adds in an order that depends on its shape, so a row's rounding errors would
    depend on the number of rows.  Multiples of one unit, few and short enough to add without
    rounding, do not.
    """
    total = torch.zeros(share.shape[1], missed.shape[1])
    for first in range(0, len(share), _EXACT_TERMS):
        part = slice(first, first + _EXACT_TERMS)
        total += _short(share[part]).T @ _short(missed[part])
    return total


def _short(columns: Float[Tensor, "from columns"]) -> Float[Tensor, "from columns"]:
    """Each column in float64, as multiples of a power of two, of at most _EXACT_BITS bits."""
    # Any unit will do for a column of zeros.
    peak = columns.abs().amax(dim=0).double().clamp(min=torch.finfo(torch.float32).tiny)
    unit = torch.exp2(peak.log2().floor() + 1 - _EXACT_BITS)
    return (columns / unit).round_().mul_(unit)
