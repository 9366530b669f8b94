"""Error feedback: round input by input, and let the inputs to come absorb each error."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.results import Quantized
from layerwise.core.statistics import check_statistics
from layerwise.quantize._grid import by_group, check_grid, fit_clipped, pack

# Columns whose errors reach the rest of the layer in one matrix product.
_BLOCK = 128
# Two numbers of this many bits, multiplied and summed over a block, fit the 53 of a float64.
_EXACT_BITS = 23
# Dampings to try, each ten times the last.
_TRIES = 8


@dataclass(frozen=True, slots=True)
class Factored:
    """What the second moments H of the inputs say of rounding them one by one.

    Attributes:
        order: The inputs, in the order in which they are rounded.
        factor: U in that order, float64, such that the damped H^-1 = U^T U.
        dead: Inputs that were always zero, as they lie in the weight.
        notes: How many those are, and where damping was raised.
    """

    order: Int64[Tensor, " in"]
    factor: Float[Tensor, "in in"]
    dead: Bool[Tensor, " in"]
    notes: tuple[str, ...]

    @property
    def importance(self) -> Float[Tensor, " in"]:
        """What a squared error costs, in the order of rounding: 1 / U_jj^2."""
        return self.factor.diagonal().float().square().reciprocal()


@runtime_checkable
class Rounder(Protocol):
    """Knows what columns are rounded to; fits its grids when their turn comes."""

    def round(self, j: int, left: Float[Tensor, "in out"]) -> Float[Tensor, " out"]:
        """What column j in the order of rounding becomes.

        Args:
            j: Its place in that order; each is asked for once, in turn.
            left: Columns as rows, in that order.  Column j and the rest of its group hold every
                correction made so far.
        """
        ...


def factorize(gram: Float[Tensor, "in in"], damping: float, act_order: bool = False) -> Factored:
    """U of the second moments, damped by a fraction of their mean over live inputs.

    H^-1 is never formed: where H = R R^T with R upper triangular, U = R^-1.

    Args:
        gram: Mean of x x^T over calibration tokens.
        damping: Added to the diagonal, as a fraction of its mean; ten times more, and a note, as
            often as H does not factor.
        act_order: Take inputs with the most energy first.

    Raises:
        UserError: The damping is no positive number, a value is NaN or infinite, or H does not
            factor.
    """
    if not 0 < damping < math.inf:
        raise UserError(f"damping is {damping}.", "Give a finite damping above 0.")
    check_statistics(gram)
    hessian = gram.to(torch.float64, copy=True)
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    count = int(dead.sum())
    notes = [f"{count} inputs were always zero; rounded to nearest"] if count else []
    # Alone on the diagonal, a dead input takes no error and passes none on.
    energy = float(diagonal[~dead].mean()) if count < len(diagonal) else 1.0
    diagonal[dead] = energy
    order = torch.arange(len(diagonal))
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
        hessian = hessian[order][:, order]

    root, used = _root(hessian, damping, energy)
    if used != damping:
        notes.append(f"damping raised to {used:g}, for a gram matrix not positive definite")
    identity = torch.eye(len(order), dtype=torch.float64)
    factor = torch.linalg.solve_triangular(root, identity, upper=True)
    return Factored(order, factor, dead, tuple(notes))


def feed_back(
    weight: Float[Tensor, "out in"], factored: Factored, rounder: Rounder, group: int
) -> Float[Tensor, "in out"]:
    """Round one column after another, moving each error onto the columns to come.

        e_j = (w_j - round(w_j)) / U_jj
        W[:, k] -= e_j U_jk                for every k > j

    The sum of e_j^2 is the loss that is left, tr(E H E^T) of the damped H.

    Args:
        weight: Layer to round.
        factored: U and the order.
        rounder: Rounds columns.
        group: Consecutive columns that the rounder looks at together, from a multiple of it on.

    Returns:
        w_j - round(w_j), in the order of rounding.
    """
    factor = factored.factor
    share = (factor / factor.diagonal()[:, None]).float()  # (in, in), U_jk / U_jj
    # Columns as contiguous rows, in the order in which they are rounded.
    left = weight.float().T[factored.order].contiguous()  # (in, out)
    missed = torch.empty_like(left)
    for start, stop in _blocks(len(left), group):
        for j in range(start, stop):
            torch.sub(left[j], rounder.round(j, left), out=missed[j])
            # One product, one sum: fused, they could round differently from row to row.
            left[j + 1 : stop] -= share[j, j + 1 : stop, None] * missed[j]
        left[stop:] -= _exact_product(share[start:stop, stop:], missed[start:stop])
    return missed


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
    feed_back(weight, factored, rounder, group)
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
        self.refits = not act_order
        # Errors move in the order of rounding, groups lie in the order of the weight.
        in_place = torch.empty_like(self.importance)
        in_place.index_copy_(0, factored.order, self.importance)
        # Taken as they come, groups are fitted when they are reached; until then any will do.
        self.scale, self.zero = grid.fit(weight, in_place, 1 if self.refits else grid.clips)
        self.groups: list[int] = (factored.order // grid.group).tolist()
        self.top = 2**grid.bits - 1
        self.codes = torch.empty(weight.shape[1], len(weight))

    def round(self, j: int, left: Float[Tensor, "in out"]) -> Float[Tensor, " out"]:
        """The nearest point; its code is kept."""
        at, grid = self.groups[j], self.grid
        if self.refits and j % grid.group == 0:
            columns = slice(j, j + grid.group)
            refit = grid.fit(left[columns].T, self.importance[columns], grid.clips)
            self.scale[at], self.zero[at] = refit[0][0], refit[1][0]
        scale, zero = self.scale[at], self.zero[at]
        code = torch.div(left[j], scale, out=self.codes[j])
        code.round_().add_(zero).clamp_(0, self.top)
        return (code - zero).mul_(scale)


def _root(
    hessian: Float[Tensor, "in in"], damping: float, energy: float
) -> tuple[Float[Tensor, "in in"], float]:
    """R upper triangular with R R^T = H once it is damped, and the damping that took."""
    # Reversing both axes turns the lower factor L L^T into the upper one, R R^T.
    damped = hessian.flip(0, 1)
    diagonal = damped.diagonal().clone()
    for power in range(_TRIES):
        used = damping * 10**power
        damped.diagonal().copy_(diagonal + used * energy)
        lower, failed = cast("tuple[Tensor, Tensor]", torch.linalg.cholesky_ex(damped))
        if not failed:
            return lower.flip(0, 1), used
    raise UserError(
        f"the gram matrix does not factor, even with damping {damping * 10 ** (_TRIES - 1):g}.",
        "Give a higher damping, or use a method that reads no gram matrix.",
    )


def _blocks(width: int, group: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most _BLOCK columns; a block begins wherever a group outgrows one."""
    stride = group * max(1, _BLOCK // group)
    for first in range(0, width, stride):
        last = min(first + stride, width)
        for start in range(first, last, _BLOCK):
            yield start, min(start + _BLOCK, last)


def _exact_product(
    share: Float[Tensor, "block later"], missed: Float[Tensor, "block out"]
) -> Float[Tensor, "later out"]:
    """share^T missed, to float32 accuracy and the same to the bit however it is summed.

    A matrix product adds in an order that depends on its shape, so a row's rounding errors would
    depend on the number of rows.  Whole numbers short enough to add without rounding do not.
    """
    (left, left_unit), (right, right_unit) = _whole(share), _whole(missed)
    return ((left.T @ right) * left_unit[:, None] * right_unit).float()


def _whole(
    columns: Float[Tensor, "block columns"],
) -> tuple[Float[Tensor, "block columns"], Float[Tensor, " columns"]]:
    """Each column as whole numbers of _EXACT_BITS bits, times a power of two."""
    # Any unit will do for a column of zeros.
    peak = columns.abs().amax(dim=0).double().clamp(min=torch.finfo(torch.float32).tiny)
    unit = torch.exp2(peak.log2().floor() + 1 - _EXACT_BITS)
    return (columns / unit).round_(), unit
