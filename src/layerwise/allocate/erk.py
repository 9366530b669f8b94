"""Erdos-Renyi-Kernel: the larger a layer, the smaller the part of it that is kept."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from layerwise.allocate._budget import check_budget
from layerwise.allocate._water import highest_line
from layerwise.core.catalogue import Claim, Paper
from layerwise.core.verbs import allocator


@allocator(
    Paper("Rigging the Lottery: Making All Tickets Winners", 2020, "1911.11134"),
    claims=(
        Claim(
            "uniform",
            "digits-mlp/prune",
            {"density": 0.2},
            0.2,
            "section 4.1 and figure 2: ERK outperforms uniform sparsities",
        ),
    ),
    nested=True,
)
def erk(
    shapes: Sequence[tuple[int, ...]], costs: Sequence[Int[Tensor, " _"]], *, budget: int
) -> Int[Tensor, " items"]:
    """Keep of each layer as many weights as its sides add up to, times one number for all.

    The density of a layer falls with its size, as if its connections were drawn like the edges of
    an Erdos-Renyi graph; a convolution of out x in x h x w counts its kernel among its sides:

        density = min(1, c (out + in + h + w) / (out in h w))

    with the largest c for which all layers keep no more than the budget.  A layer that c would
    make denser than 1 is kept whole, and c is that of the others.

    Unlike the paper, a layer keeps one of the counts in `costs`: the highest that c times its
    sides allows, and never less than the first.  Layers alike always keep the same.

    Args:
        shapes: Shape of each item's weight.
        costs: One tensor per item, ascending: how many weights each level keeps.
        budget: How many weights all items together may keep.

    Returns:
        Index of each item's level.

    Raises:
        UserError: The first levels together keep more than the budget.
    """
    check_budget(costs, budget)
    scales = [cost.double() / sum(shape) for cost, shape in zip(costs, shapes, strict=True)]
    return torch.tensor(highest_line(costs, scales, budget), dtype=torch.int64)
