"""FLAP: take out the channels that a constant can stand in for."""

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.results import Narrowed
from layerwise.core.statistics import check_statistics
from layerwise.core.verbs import narrower
from layerwise.narrow._units import by_unit, check_units, keep_units

_SOURCE = "Table 1: LLaMA-7B at 20%, perplexity 14.62 against 22.12 (dense 12.62)"


@narrower(
    Paper(
        "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
        2023,
        "2312.11983",
    ),
    claims=(
        Claim("wanda", "reference-6m/narrow", {"keep": 0.8}, 0.05, _SOURCE),
        Claim("wanda", "stories-char-940k/narrow", {"keep": 0.8}, 0.05, _SOURCE),
        Claim("wanda", "bytes-wikitext/narrow", {"keep": 0.8}, 0.05, _SOURCE),
        Claim("magnitude", "reference-6m/narrow", {"keep": 0.8}, 0.05, "ours: the baseline"),
        Claim("magnitude", "stories-char-940k/narrow", {"keep": 0.8}, 0.05, "ours: the baseline"),
    ),
)
def flap(
    weight: Float[Tensor, "out in"],
    mean: Float[Tensor, " in"],
    variance: Float[Tensor, " in"],
    *,
    density: float,
    units: int,
) -> Narrowed:
    """Take out channels that hardly vary, and leave what they gave on average as a bias.

    Without channel j a layer loses W_:j X_j.  A bias gives the mean of that back, so that only the
    fluctuation counts (WIFV), brought to one scale within each layer:

        S_j = Var(X_j) * ||W_:j||^2
        z_j = (S_j - mean S) / std S                     z of a unit: the mean over its channels
        b  += W_:,gone E[X_gone]

    Units of all layers compete by z where each block may keep a number of its own.

    Unlike the authors' code, the variance is that over all tokens and not a running sum about means
    that move, and scores of attention are not squared first.  The paper does not say what z is of a
    layer whose channels all score the same: 0.

    Args:
        weight: The layer that reads the channels.
        mean: Of each channel, over tokens.
        variance: Of each channel, over tokens.
        density: Fraction of units to keep, in (0, 1]; one stays at least.
        units: Equal runs of channels that stay or go as one: heads, or each channel alone.

    Raises:
        UserError: The density cannot be met, or a statistic is NaN or infinite.
    """
    check_units(density, weight.shape[1], units)
    check_statistics(mean, variance)
    read = weight.double()  # float64, so that tiny weights have squares
    score = variance.double() * read.square().sum(dim=0)  # (in,)
    spread = score.std(correction=0)
    standard = (score - score.mean()) / spread if spread > 0 else score * 0.0
    # Constant channels all have the lowest score there is.
    scores = by_unit(standard, units)
    kept, notes = keep_units(scores, density)
    gone = ~kept.repeat_interleave(weight.shape[1] // units)  # (in,)
    bias = (read * gone) @ mean.double()
    return Narrowed(kept, scores.float(), bias.float(), None, notes)
