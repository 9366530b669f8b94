"""Wanda: prune by weight times the size of the input it multiplies."""

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.results import Pruned
from layerwise.core.statistics import check_statistics
from layerwise.core.verbs import pruner
from layerwise.prune._mask import check_density, keep_highest

_SOURCE = "README: LLaMA2-7B at 50%, perplexity 6.42 against 14.89 (dense 5.12)"


@pruner(
    Paper("A Simple and Effective Pruning Approach for Large Language Models", 2023, "2306.11695"),
    claims=(
        Claim("magnitude", "bytes-wikitext/prune", {"density": 0.5}, 0.1, _SOURCE),
        Claim("magnitude", "bytes-wikitext-outliers/prune", {"density": 0.5}, 0.1, _SOURCE),
        Claim("magnitude", "stories-char-940k/prune", {"density": 0.5}, 0.1, _SOURCE),
        Claim("magnitude", "reference-6m/prune", {"density": 0.4}, 0.1, _SOURCE),
        Claim("magnitude", "builtin-tiny/prune", {"density": 0.4}, 0.1, _SOURCE),
    ),
    rows="independent",
)
def wanda(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    density: float,
    among: int = 0,
) -> Pruned:
    """Keep, in each row, the weights that matter most to its output.

    A small weight on a large input can matter more than a large weight on a small input.  The
    score is the weight's size times the norm of its input over the calibration tokens:

        S_ij = |W_ij| * ||X_j||_2 ,   ||X_j||_2 ~ sqrt(gram_jj)

    Each output row keeps its round(density * in) highest scores, one at least; rows are never
    compared with each other.  The weights that stay are not changed.

    Unlike the paper, counts are rounded to nearest rather than towards keeping.  The paper does
    not say what to do when no token reached the layer: then it is pruned by magnitude alone,
    and the notes say so.

    Args:
        weight: Layer to prune.
        gram: Mean of x x^T over tokens; only its diagonal counts.
        density: Fraction of weights to keep, in (0, 1].
        among: Compare only within windows of this many consecutive inputs of a row: density
            0.5 among 4 is the 2:4 pattern.  0 compares the whole row.

    Raises:
        UserError: The density cannot be met, or a statistic is NaN or infinite.
    """
    check_density(density, weight.shape[1], among)
    check_statistics(gram)
    norm = gram.diagonal().float().clamp(min=0).sqrt()  # (in,)
    notes: tuple[str, ...] = ()
    if not norm.any():
        norm, notes = torch.ones_like(norm), ("no input was seen: pruned by magnitude",)
    scores = (weight.float().abs() * norm).reshape(-1, among or weight.shape[1])  # (sets, size)
    count = round(density * scores.shape[1])
    if not count:
        empty = f"a density of {density:g} would empty rows of {weight.shape[1]} inputs: one stays"
        count, notes = 1, (*notes, empty)
    kept = keep_highest(scores, count).reshape(weight.shape)
    return Pruned(kept, weight.float().where(kept, 0.0), notes)
