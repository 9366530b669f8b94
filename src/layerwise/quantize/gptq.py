"""GPTQ: round input by input, and let the inputs to come absorb each rounding error."""

import math
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.results import Quantized
from layerwise.core.statistics import check_statistics
from layerwise.core.verbs import quantizer
from layerwise.quantize._grid import by_group, check_grid, fit_clipped, pack

# Columns whose errors reach the rest of the layer in one matrix product.
_BLOCK = 128
# Two numbers of this many bits, multiplied and summed over a block, fit the 53 of a float64.
_EXACT_BITS = 23
# Dampings to try, each ten times the last.
_TRIES = 8

_SOURCE = "table in the authors' README: LLaMA-7B at 4 bits, and at 3 bits in groups of 128"
_SYMMETRIC = {"group": 32, "symmetric": True}


@quantizer(
    Paper(
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        2022,
        "2210.17323",
    ),
    claims=(
        Claim("rtn", "bytes-wikitext/quantize", {"bits": 3, "group": 64}, 0.5, _SOURCE),
        Claim("rtn", "stories-char-940k/quantize", _SYMMETRIC | {"bits": 4}, 0.5, _SOURCE),
        Claim("rtn", "reference-6m/quantize", _SYMMETRIC | {"bits": 3}, 0.5, _SOURCE),
        Claim("rtn", "builtin-tiny/quantize", _SYMMETRIC | {"bits": 3}, 0.5, _SOURCE),
    ),
    exempt={"pruned_weights_stay_zero": "a zero moves to absorb the errors of its row"},
    rows="independent",
)
def gptq(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    bits: int,
    group: int = 128,
    symmetric: bool = False,
    damping: float = 0.01,
    act_order: bool = False,
    clips: int = 25,
) -> Quantized:
    """Round one input after another, moving each error onto the inputs not yet rounded.

    Rounding column j of W leaves an error in the layer's output.  The best that the columns
    after j can do about it is known in closed form from the inputs' second moments H:

        e_j = (w_j - quant(w_j)) / U_jj
        W[:, k] -= e_j U_jk                for every k > j                        (eq. 2)

    where U is the upper Cholesky factor of H^-1 = U^T U (algorithm 1) and H is the gram matrix
    plus `damping` times the mean of its diagonal over live inputs.  The loss that is left is the
    sum of e_j^2.  H^-1 is never formed: where H = R R^T with R upper triangular, U = R^-1.

    Unlike the authors' code, a grid is fitted to all corrections made so far, so that nothing
    depends on how columns are blocked; and its range is the one that loses least when columns
    weigh 1 / U_jj^2, as they do in the loss.  Unlike the authors' code, weights of an input that
    calibration never saw are rounded to nearest, not set to zero.  Unlike the authors' code, which
    sets the diagonal of dead inputs to 1 before it takes the mean, they have no part in the mean.

    Args:
        weight: Layer to quantize.
        gram: Mean of x x^T over calibration tokens.
        bits: Width of a code, from 1 to 16.
        group: Inputs that share a grid.
        symmetric: Centre every grid on 0.0, so that no zero points are stored.
        damping: Added to the diagonal, as a fraction of its mean over live inputs; ten times
            more, and a note, as often as H does not factor.
        act_order: Take inputs with the most energy first.  Grids are then fitted to the weights
            as given, so that every group is still made of consecutive inputs.
        clips: Ranges to try for each grid: 100%, 99%, 98% ... of the whole.

    Returns:
        Codes and grids.  Notes say how many inputs were dead and where damping was raised.

    Raises:
        UserError: An option is out of range, a value is NaN or infinite, or H does not factor.
    """
    check_grid(weight, bits, group)
    if not 0 < damping < math.inf or not 1 <= clips <= 100:
        raise UserError(
            f"damping is {damping}, clips is {clips}.",
            "Give a finite damping above 0, clips from 1 to 100.",
        )
    check_statistics(gram)
    order, factor, notes = _factorize(gram, damping, act_order)
    share = (factor / factor.diagonal()[:, None]).float()  # (in, in), U_jk / U_jj
    importance = factor.diagonal().float().square().reciprocal()  # (in,), 1 / U_jj^2

    # Columns as contiguous rows, in the order in which they are rounded.
    left = weight.float().T[order].contiguous()  # (in, out)
    codes, missed = torch.empty_like(left), torch.empty_like(left)
    grid = _Grid(bits, group, symmetric, clips)
    # Errors move in the order of rounding, groups lie in the order of the weight.
    in_place = torch.empty_like(importance).index_copy_(0, order, importance)
    # Taken as they come, groups are fitted when they are reached; until then any grid will do.
    first = grid if act_order else grid._replace(clips=1)
    scale, zero = _fit(weight, in_place, first)  # (groups, out)
    groups = (order // group).tolist()
    for start, stop in _blocks(len(left), group):
        for j in range(start, stop):
            at = groups[j]
            if j % group == 0 and not act_order:
                columns = slice(j, j + group)
                refit = _fit(left[columns].T, importance[columns], grid)
                scale[at], zero[at] = refit[0][0], refit[1][0]
            code = torch.div(left[j], scale[at], out=codes[j])
            code.round_().add_(zero[at]).clamp_(0, 2**bits - 1)
            torch.sub(left[j], (code - zero[at]).mul_(scale[at]), out=missed[j])
            # One product, one sum: fused, they could round differently from row to row.
            left[j + 1 : stop] -= share[j, j + 1 : stop, None] * missed[j]
        left[stop:] -= _exact_product(share[start:stop, stop:], missed[start:stop])

    codes = torch.empty_like(codes).index_copy_(0, order, codes)
    return pack(
        codes.T.contiguous(),
        scale.T.contiguous(),
        zero.T.contiguous(),
        width=len(codes),
        bits=bits,
        group=group,
        symmetric=symmetric,
        notes=notes,
    )


class _Grid(NamedTuple):
    bits: int
    group: int
    symmetric: bool
    clips: int


def _factorize(
    gram: Float[Tensor, "in in"], damping: float, act_order: bool
) -> tuple[Int64[Tensor, " in"], Float[Tensor, "in in"], tuple[str, ...]]:
    """The order of rounding, and U in that order, such that the damped H^-1 = U^T U."""
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
    return order, factor, tuple(notes)


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


def _fit(
    weight: Float[Tensor, "out width"], importance: Float[Tensor, " width"], grid: _Grid
) -> tuple[Float[Tensor, "groups out"], Float[Tensor, "groups out"]]:
    scale, zero = fit_clipped(
        by_group(weight, grid.group),
        by_group(importance[None], grid.group),
        grid.bits,
        grid.symmetric,
        grid.clips,
    )
    return scale.T.contiguous(), zero.T.contiguous()


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
