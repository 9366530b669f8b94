"""Layer-adaptive magnitude pruning: one global threshold on a score that layers can share."""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from layerwise.allocate._budget import check_budget
from layerwise.allocate._steps import climb
from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import allocator

_SOURCE = "abstract: outperforms existing schemes for layerwise sparsity, image classification"


@allocator(
    Paper("Layer-adaptive Sparsity for the Magnitude-based Pruning", 2020, "2010.07611"),
    claims=(Claim("uniform", "digits-mlp/prune", {"density": 0.2}, 0.3, _SOURCE),),
)
def lamp(
    weights: Sequence[Float[Tensor, "..."]], costs: Sequence[Int[Tensor, " _"]], *, budget: int
) -> Int[Tensor, " items"]:
    """Keep the weights with the highest LAMP scores anywhere in the model.

    A weight's score is its share of the energy that would be left in its layer had every
    smaller weight already been pruned:

        score(u) = W[u]^2 / sum of W[v]^2 over all v with |W[v]| >= |W[u]|

    Rescaling a layer leaves its scores alone, so layers compete fairly for one budget; and
    the largest weight of a layer scores 1.  One threshold for all layers decides how many
    weights each one keeps.

    Unlike the paper, a layer keeps one of the counts in `costs`, the highest whose last weight
    still reaches the threshold, and the threshold is the lowest that the budget allows.  When
    every count is a level this is the paper's rule, with equal scores decided by position so
    that the budget is met exactly.  Only the scores at the levels are held, one layer at a time
    is sorted, and the sums run in float64 from the largest weight down, which loses nothing.

    Args:
        weights: One tensor per item, of any shape; read once, one at a time.
        costs: One tensor per item, ascending: how many weights each level keeps.
        budget: How many weights all items together may keep.

    Returns:
        Index of each item's level.

    Raises:
        UserError: The first levels together keep more than the budget, or a level keeps more
            weights than its item has.
    """
    check_budget(costs, budget)
    wanted = [
        _last_scores(item, weight, counts[1:])
        for item, (weight, counts) in enumerate(zip(weights, costs, strict=True))
    ]
    owners = [item for item, scores in enumerate(wanted) for _ in scores]
    # Scores fall within a layer, so a stable sort keeps each layer's levels in order.
    pooled = torch.cat([*wanted, torch.empty(0)])  # (steps,)
    order = cast("list[int]", pooled.argsort(descending=True, stable=True).tolist())
    levels = climb(costs, [0] * len(costs), (owners[step] for step in order), budget)
    return torch.tensor(levels, dtype=torch.int64)


def _last_scores(
    item: int, weight: Float[Tensor, "..."], counts: Int[Tensor, " levels"]
) -> Float64[Tensor, " levels"]:
    """Score of the last weight that each level adds."""
    if counts.numel() and int(counts[-1]) > weight.numel():
        raise UserError(
            f"item {item} has {weight.numel()} weights and a level that keeps {int(counts[-1])}.",
            "Give costs as the number of weights kept, not in bytes.",
        )
    # A level that keeps nothing is the first or costs no more than it: it is free.
    return torch.cat([torch.ones(1, dtype=torch.float64), _scores(weight)])[counts]


def _scores(weight: Float[Tensor, "..."]) -> Float64[Tensor, " size"]:
    """LAMP scores of one layer, largest weight first."""
    # Largest first, the sum over every weight at least as large is a running sum.
    energy = weight.flatten().double().square().sort(descending=True).values
    # A layer of zeros scores 0 throughout instead of 0/0.
    return energy / energy.cumsum(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
