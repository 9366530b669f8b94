"""Scores, stretched to a band of densities around the budget's."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerwise.allocate._budget import check_budget
from layerwise.allocate._water import highest_line
from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import allocator

_OWL = "README: LLaMA-7B at 70%, Wanda, perplexity 24.55 against 85.77 (dense 5.68)"
_DLP = "README: LLaMA-7B at 70%, Wanda, perplexity 20.46 against 86.38 (dense 5.68)"
_BY_OWL = {"pruner": "wanda", "measure": "owl"}
_BY_DLP = {"pruner": "wanda", "measure": "dlp", "options": {"allocate/stretch": {"spread": 0.15}}}


@allocator(
    Paper(
        "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High "
        "Sparsity",
        2023,
        "2310.05175",
    ),
    claims=(
        Claim("uniform", "reference-6m/allocate", {"density": 0.4, **_BY_OWL}, 0.05, _OWL),
        Claim("uniform", "stories-char-940k/allocate", {"density": 0.5, **_BY_OWL}, 0.05, _OWL),
        Claim("uniform", "reference-6m/allocate", {"density": 0.4, **_BY_DLP}, 0.05, _DLP),
        Claim("uniform", "stories-char-940k/allocate", {"density": 0.5, **_BY_DLP}, 0.05, _DLP),
    ),
    nested=True,
    fine=True,
)
def stretch(
    scores: Float[Tensor, " items"],
    costs: Sequence[Int[Tensor, " _"]],
    *,
    budget: int,
    spread: float = 0.08,
) -> Int[Tensor, " items"]:
    """Move each item's density from the common one by its score, never by more than a band.

    The scores s are stretched to a band of twice `spread` (the paper's lambda), which is then
    shifted to where the budget is spent:

        t_i       = 2 spread (s_i - min s) / (max s - min s)
        density_i = t_i + c

    With OWL's scores (`--measure owl`) this is OWL; DLP (arXiv 2505.23807, `--measure dlp`) has the
    same rule with a spread of 0.15.  Stretching cares neither for the unit of the scores nor for
    what is added to all, such as DLP's 1 - m_i / sum m.  Equal scores, or no spread, give everyone
    the same.

    Unlike the papers, c is not the target less the plain mean of t: it is the largest that the
    budget pays for.  Items of different sizes so count by their size, and what a density beyond 1
    or below the first level cannot take is shared out among the others.

    Args:
        scores: Importance of each item; higher is more important.
        costs: One tensor per item, ascending; a density is a cost as a fraction of the last.
        budget: What all items together may cost.
        spread: Half the width of the band, a density.

    Returns:
        Index of each item's level.

    Raises:
        UserError: The first levels together cost more than the budget, or the spread is negative.
    """
    check_budget(costs, budget)
    if not 0 <= spread <= 0.5:
        raise UserError(f"spread {spread} is no half of a band.", "Give 0 to 0.5, such as 0.08.")
    above = scores.double() - scores.double().min() if len(costs) else scores
    # Where all are equal, 0 / 0 is 0: nobody is above.
    widest = above.max().clamp(min=torch.finfo(torch.float64).tiny) if len(costs) else 1
    offsets = 2 * spread * above / widest  # (items,)
    lines = [
        cost.double() / max(int(cost[-1]), 1) - offset
        for cost, offset in zip(costs, offsets, strict=True)
    ]
    return torch.tensor(highest_line(costs, lines, budget), dtype=torch.int64)
