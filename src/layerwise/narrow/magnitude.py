"""Magnitude of units: the baseline of all that take out units."""

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.results import Narrowed
from layerwise.core.verbs import narrower
from layerwise.narrow._units import by_unit, check_units, keep_units, relative


@narrower(Paper("Pruning Filters for Efficient ConvNets", 2016, "1608.08710"))
def magnitude(weight: Float[Tensor, "out in"], *, density: float, units: int) -> Narrowed:
    """Keep the channels that are read by the largest weights.

    The score of a channel is the energy of the column that reads it, in units of the layer's mean,
    and that of a unit the mean over its channels:

        S_j = sum_i W_ij^2

    Unlike the paper, which scores a filter by the weights that make a channel, it is scored by
    those that read it: a gated pair and heads have several that make it.

    Args:
        weight: The layer that reads the channels.
        density: Fraction of units to keep, in (0, 1]; one stays at least.
        units: Equal runs of channels that stay or go as one: heads, or each channel alone.

    Raises:
        UserError: The density cannot be met.
    """
    check_units(density, weight.shape[1], units)
    scores = by_unit(relative(weight.double().square().sum(dim=0)), units)
    kept, notes = keep_units(scores, density)
    return Narrowed(kept, scores.float(), torch.zeros(len(weight)), None, notes)
