"""Feature weighting: how unequally a block weighs the features of what it has read."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.reading.labelled import check_labels
from layerwise.core.verbs import measure
from layerwise.measure._tokens import column, slope

_LEAST = 1e-6  # a feature of less weight counts as this much


def _across(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """How the logarithms of the strongest class by the weakest, and of the rank, rise by block."""
    names = [name for name in records[0] if name.startswith("weight_")]
    curves = {name: [math.log(max(x, _LEAST)) for x in column(records, name)] for name in names}
    weak, *_, strong = sorted(curves.values(), key=sum)
    ranks = [math.log(max(rank, _LEAST)) for rank in column(records, "effective_rank")]
    ratios = [one - other for one, other in zip(strong, weak, strict=True)]
    return {"slope": slope(ratios), "rank_slope": slope(ranks)}


@measure(
    Paper(
        "Investigating the Benefits of Projection Head for Representation Learning",
        2024,
        "2403.11391",
    ),
    unit="block",
    across=_across,
)
def feature_weighting(
    states: Float[Tensor, "examples width"], labels: Int64[Tensor, " examples"]
) -> dict[str, float]:
    """Score a block by how evenly its states spread, and tell how strongly they show each class.

    In a network trained by gradient descent with weight decay, layers balance: what the whole
    network weighs by sigma, layer l of L weighs by sigma^(l/L), so that deeper layers weigh
    features ever more unequally, and what the loss does not ask for fades.

        s       singular values of the states less their mean ,   p = s^2 / sum s^2
        effective_rank  exp(- sum p log p)      participation  1 / sum p^2      top  max p
        weight_c        ||mean of class c - mean of the others|| / root of the mean variance

    Across the model, `slope` is by how much the logarithm of the strongest class's weight by the
    weakest's rises from block to block (least squares; strongest and weakest in the mean over
    blocks): above 0, deeper blocks are more unequal.  Of two classes both weigh the same, and it
    is 0.  `rank_slope` is that of the logarithm of the effective rank.

    The paper has no such scores: it shows the effect in theory and by probes, and these are ours.
    In trained networks with norms only the trend can be expected.  The rank needs many more
    examples than features: it cannot be more than their number.  A higher one is not always better.

    Args:
        states: What the block answers at the last token of each text.
        labels: The class of each, from 0.

    Returns:
        The record above; its score is `effective_rank`, 0 where all states are one.

    Raises:
        UserError: There is one class, or there are few examples.
    """
    check_labels(labels)
    centred = states.double() - states.double().mean(dim=0)
    energy = torch.linalg.svdvals(centred).square()
    shares = energy / energy.sum().clamp(min=torch.finfo(torch.float64).tiny)
    spread = float(centred.square().mean().sqrt())
    # Equal states differ from their mean by rounding alone.
    seen = spread > 1e-9 * float(states.double().abs().max())
    record = {
        "effective_rank": float(torch.special.entr(shares).sum().exp()) if seen else 0.0,
        "participation": float(1 / shares.square().sum()) if seen else 0.0,
        "top": float(shares.max()) if seen else 0.0,
    }
    for one in labels.unique().tolist():
        own = labels == one
        apart = centred[own].mean(dim=0) - centred[~own].mean(dim=0)
        record[f"weight_{one}"] = float(apart.norm()) / spread if seen else 0.0
    return record
