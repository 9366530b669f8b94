"""DARE before TIES: drop differences at random, then average those that agree in sign."""

from collections.abc import Sequence

from jaxtyping import Float, Int64
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import merger
from layerwise.merge._differences import elected
from layerwise.merge._dropping import dropped


@merger(
    Paper(
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free "
        "Lunch",
        2023,
        "2311.03099",
    ),
    rows="entry",
)
def dare_ties(
    models: Float[Tensor, "models ..."],
    base: Float[Tensor, "..."],
    shares: Float[Tensor, " models"],
    entries: Int64[Tensor, "..."],
    seeds: Sequence[int],
    *,
    density: float | Sequence[float] = 0.1,
    scale: float = 1.0,
    seed: int = 0,
    rescale: bool = True,
    normalize: bool = False,
) -> Float[Tensor, "..."]:
    """Elect signs among differences that were dropped at random instead of trimmed.

        m_k ~ Bernoulli(density),   d_k = m_k (W_k - W_0) / density
        sign = sign(sum_k s_k d_k), positive where the sum is 0
        W    = W_0 + scale sum of s_k d_k over k with that sign, [/ sum of those s_k]

    Args:
        models: The same tensor of every fine-tuned model.
        base: That of the model they were tuned from.
        shares: How much each model counts.
        entries: Where in its tensor each entry lies.
        seeds: A number for each model and tensor.
        density: Probability with which a difference is kept, or one for each model.
        scale: Times the merged difference.
        seed: Another one keeps others.
        rescale: Divide by the density.
        normalize: Average what agrees; otherwise it is added up.

    Raises:
        UserError: A density is no fraction.
    """
    kept = dropped(models, base, entries, seeds, density, seed, rescale)
    return elected(kept, shares, normalize).mul_(scale).add_(base)
