"""Filter shift: how far the filters of a convolution are from those of another model."""

from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import measure
from layerwise.measure._filters import filters_of

# An empty bin of a histogram counts as this, as if that share of a filter were in it.
_EMPTY = torch.finfo(torch.float32).eps


@measure(
    Paper(
        "CNN Filter DB: An Empirical Investigation of Trained Convolutional Filters",
        2022,
        "2203.15331",
    )
)
def filter_shift(
    weight: Float[Tensor, "out in"],
    base: Float[Tensor, "out in"],
    *,
    entries: int = 9,
    bins: int = 70,
) -> float:
    """Score a convolution by the divergence of its filters from those of another model.

    Every filter is scaled by its own largest entry.  On the principal axes i of both populations
    together, with the share v_i of their variance, the coefficients of each population make a
    histogram over the range of both, P_i and Q_i:

        D = sum_i v_i (KL(P_i || Q_i) + KL(Q_i || P_i))         nats

    0 for the same filters in any order, 2 ln(1 / eps) or so where no bin is shared.  It grows as
    populations shrink, by their empty bins: two draws of normal filters are about 4.3 apart if they
    are 100, 0.22 if 1,000 and 0.018 if 10,000.  Layers of very different sizes are not to be
    compared, and those of few filters show little: fewer bins help.

    The paper compares all filters of many models at once, on one basis for all of them; here one
    layer of two models, on a basis of both.  It does not say that a layer which moved further is
    more important: here it is.  A layer whose width `entries` does not divide, such as most linear
    layers, has no filters, and no shift.

    Args:
        weight: The layer, the kernel's entries of each input channel side by side.
        base: The same layer of the other model.
        entries: Height times width of the kernel.
        bins: Of each histogram.

    Returns:
        Symmetric divergence, 0 or more; higher is more important.

    Raises:
        UserError: `entries` or `bins` is below 1.
    """
    if bins < 1:
        raise UserError(f"histograms of {bins} bins are asked for.", "Give 1 or more.")
    ours, theirs = (_scaled(filters_of(given, entries)) for given in (weight, base))
    if not len(ours):
        return 0.0
    together = torch.cat([ours, theirs])
    centre = together.mean(dim=0)
    # Only the axes of both together are looked at, so that neither population has its own.
    spread, axes = torch.linalg.eigh((together - centre).T @ (together - centre))
    spread = spread.clamp(min=0)
    # What is left of a population without variance is rounding.
    if float(spread.sum()) < 1e-20 * together.numel():
        return 0.0
    shares = spread / spread.sum()
    sides = [(part - centre) @ axes for part in (ours, theirs)]  # (filters, entries) each
    shift = 0.0
    for axis, share in enumerate(shares.tolist()):
        first, second = (side[:, axis] for side in sides)
        low = float(torch.minimum(first.min(), second.min()))
        high = float(torch.maximum(first.max(), second.max()))
        if high > low:
            p, q = (_histogram(part, bins, low, high) for part in (first, second))
            shift += share * float(((p - q) * (p / q).log()).sum())
    return max(0.0, shift)


def _scaled(filters: Float64[Tensor, "filters entries"]) -> Float64[Tensor, "filters entries"]:
    """Every filter with a largest entry of 1; those of zeros stay so."""
    largest = filters.abs().amax(dim=1, keepdim=True)
    return filters / largest.where(largest > 0, 1.0)


def _histogram(values: Float64[Tensor, " _"], bins: int, low: float, high: float) -> Any:
    """Shares of the values in each bin, none of them 0, (bins,)."""
    counted = values.histc(bins, low, high) / len(values)
    filled = counted.clamp(min=_EMPTY)
    return filled / filled.sum()
