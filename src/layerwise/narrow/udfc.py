"""UDFC: take out channels of a convolution that the others can be added up to, without data."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.errors import UserError
from layerwise.core.results import Narrowed
from layerwise.core.verbs import narrower
from layerwise.narrow._units import by_unit, check_units, keep_units, relative


@narrower(
    Paper(
        "Unified Data-Free Compression: Pruning and Quantization without Fine-Tuning",
        2023,
        "2308.07209",
    ),
    exempt={"what_nobody_reads_goes_first": "it goes by what makes a channel, not what reads it"},
)
def udfc(
    weight: Float[Tensor, "out in"],
    filters: Float[Tensor, "in fan"],
    shifts: Float[Tensor, " in"],
    *,
    density: float,
    units: int,
    shift_weight: float = 0.01,
    damping: float = 0.008,
) -> Narrowed:
    """Take out the channels with the smallest filters, and put sums of the others in their place.

    A channel is f_j * x + b_j before its ReLU, the batch norm after it counted in.  One that goes
    is a sum of those that stay, with the coefficients that are least in error of its filter and
    its shift; what read it reads the sum:

        s_j = argmin ||f_j - sum_i s_i f_i||^2 + a1 (b_j - sum_i s_i b_i)^2 + a2 ||s||^2
            = (F F^T + a1 b b^T + a2 I)^-1 (F f_j + a1 b_j b)        over the i that stay
        W_:i += sum_j s_ij W_:j

    As if relu(sum s z) were sum s relu(z): that is so where one coefficient above 0 does it, and an
    approximation elsewhere, which helps where a layer has more channels than it needs.

    The paper's code is not to be had: the three terms are read from its abstract and from reports
    of it.  Unlike the paper, which prunes each layer by a ratio, units of all layers compete by the
    norms of their filters, in units of the layer's mean.

    Args:
        weight: The layer that reads the channels; positions of a kernel lie below each other.
        filters: What makes each channel, the gain of its batch norm counted in.
        shifts: What is added to each channel, likewise.
        density: Fraction of units to keep, in (0, 1]; one stays at least.
        units: Equal runs of channels that stay or go as one.
        shift_weight: a1, how much an error of the shift counts.
        damping: a2, how much large coefficients cost.

    Raises:
        UserError: The density cannot be met, or an option is out of range.
    """
    check_units(density, weight.shape[1], units)
    if not (0 <= shift_weight < math.inf and 0 < damping < math.inf):
        raise UserError(
            f"shift_weight is {shift_weight}, damping is {damping}.",
            "Give a finite shift_weight of 0 or more, and a finite damping above 0.",
        )
    made, added = filters.double(), shifts.double()
    scores = by_unit(relative(made.norm(dim=1)), units)
    kept, notes = keep_units(scores, density)
    stays = kept.repeat_interleave(weight.shape[1] // units)  # (in,)
    bias = torch.zeros(len(weight))
    if kept.all():
        return Narrowed(kept, scores.float(), bias, None, notes)
    # A shift is one more entry of its filter.
    whole = torch.cat([made, shift_weight**0.5 * added[:, None]], dim=1)  # (in, fan + 1)
    left = whole[stays]
    inner = left @ left.T
    inner.diagonal().add_(damping)
    sums = torch.linalg.solve(inner, left @ whole[~stays].T)  # (stay, gone)
    read = weight.double()
    after = torch.zeros_like(read)
    after[:, stays] = read[:, stays] + read[:, ~stays] @ sums.T
    return Narrowed(kept, scores.float(), bias, after.float(), notes)
