"""Wanda, unit by unit: weights times the size of the inputs that they multiply."""

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.results import Narrowed
from layerwise.core.statistics import check_statistics
from layerwise.core.verbs import narrower
from layerwise.narrow._units import by_unit, check_units, keep_units, relative

_SOURCE = "ours: what inputs show should help here as it does weight by weight"


@narrower(
    Paper("A Simple and Effective Pruning Approach for Large Language Models", 2023, "2306.11695"),
    claims=(
        Claim("magnitude", "reference-6m/narrow", {"keep": 0.8}, 0.05, _SOURCE),
        Claim("magnitude", "stories-char-940k/narrow", {"keep": 0.8}, 0.05, _SOURCE),
    ),
)
def wanda(
    weight: Float[Tensor, "out in"],
    norm: Float[Tensor, " in"],
    *,
    density: float,
    units: int,
) -> Narrowed:
    """Keep the channels whose inputs, times the weights that read them, are largest.

    The score of a channel is that of its weights, added up, in units of the layer's mean:

        S_j = sum_i |W_ij| * ||X_j||_2

    and that of a unit the mean over its channels.  Nothing stands in for what goes.  The paper
    scores weights; its sum over a column is what FLAP (2312.11983) compares with, as Wanda-sp.

    Args:
        weight: The layer that reads the channels.
        norm: Root of the mean of x^2 over tokens.
        density: Fraction of units to keep, in (0, 1]; one stays at least.
        units: Equal runs of channels that stay or go as one: heads, or each channel alone.

    Raises:
        UserError: The density cannot be met, or a statistic is NaN or infinite.
    """
    check_units(density, weight.shape[1], units)
    check_statistics(norm)
    seen = norm.double() if norm.any() else torch.ones_like(norm, dtype=torch.float64)
    scores = by_unit(relative(weight.double().abs().sum(dim=0) * seen), units)
    kept, notes = keep_units(scores, density)
    if not norm.any():
        notes = (*notes, "no input was seen: scored by magnitude")
    return Narrowed(kept, scores.float(), torch.zeros(len(weight)), None, notes)
