"""Coarse-to-fine pruning: what is kept above a floor goes to layers by their scores."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerwise.allocate._budget import check_budget
from layerwise.allocate._water import highest_line
from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import allocator

_SOURCE = "README: BLIP at 50%, Wanda, CIDEr on COCO 111.0 against 97.1 (dense 133.3)"
_BY = {"pruner": "wanda", "measure": "ecoflap"}
_DRAWN = {"pruner": "wanda", "measure": "ecoflap_draws"}


@allocator(
    Paper(
        "ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models",
        2023,
        "2310.02998",
    ),
    claims=(
        Claim("uniform", "stories-char-940k/allocate", {"density": 0.5, **_BY}, 0.05, _SOURCE),
        Claim("uniform", "reference-6m/allocate", {"density": 0.4, **_BY}, 0.05, _SOURCE),
        Claim("uniform", "stories-char-940k/allocate", {"density": 0.5, **_DRAWN}, 0.05, _SOURCE),
    ),
    fine=True,
)
def ecoflap(
    scores: Float[Tensor, " items"],
    costs: Sequence[Int[Tensor, " _"]],
    *,
    budget: int,
    below: float = 0.1,
) -> Int[Tensor, " items"]:
    """Keep a floor of every item, and share out the rest in proportion to the scores.

    With n_i what item i costs whole, d = budget / sum n the common density, and S the scores:

        kept_i = min(n_i, n_i max(0, d - below) + c S_i)

    with the largest c that the budget pays for: what a full item cannot take goes to the others,
    again by their scores.  No item so is sparser than the common density by more than `below`,
    the paper's largest sparsity less the target.  With `below` 0 all get the same.

    Unlike the paper, each layer is an item by itself, where it may be a whole block; an item
    without a score comes after all others, instead of getting what is left in the order of items;
    and c is found at once, where the authors' code rounds each share up and then, by a wrong sign,
    adds to the largest what it means to take back.

    Args:
        scores: Importance of each item, from 0; higher is more important.
        costs: One tensor per item, ascending; the last is what the item costs whole.
        budget: What all items together may cost.
        below: How far below the common density an item may be.

    Returns:
        Index of each item's level.

    Raises:
        UserError: The first levels together cost more than the budget, a score is negative or no
            number, or `below` is negative.
    """
    check_budget(costs, budget)
    if not 0 <= below <= 1:
        raise UserError(f"below {below} is no part of a density.", "Give 0 to 1, such as 0.1.")
    if not bool((scores >= 0).all()):
        raise UserError(
            f"a share of {float(scores.min())} cannot be given.",
            "Use a measure that is never negative, such as ecoflap.",
        )
    whole = torch.tensor([int(cost[-1]) for cost in costs], dtype=torch.float64)  # (items,)
    floor = max(0.0, budget / max(float(whole.sum()), 1.0) - below) if below else 0.0
    shares = _shares(scores, whole) if below else whole
    lines = [
        (cost.double() - floor * size).clamp(min=0) / share
        for cost, size, share in zip(costs, whole, shares, strict=True)
    ]
    return torch.tensor(highest_line(costs, lines, budget), dtype=torch.int64)


def _shares(scores: Float[Tensor, " items"], whole: Float[Tensor, " items"]) -> Tensor:
    """The scores, none of which is 0: beside them such a one counts for next to nothing."""
    shares = scores.double()
    if not shares.any():
        return whole.clamp(min=1)
    return shares.clamp(min=1e-9 * float(shares.max()))
