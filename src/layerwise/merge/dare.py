"""DARE: drop differences at random and rescale the rest."""

from collections.abc import Sequence

from jaxtyping import Float, Int64
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import merger
from layerwise.merge._differences import share_of_all
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
def dare(
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
    """Add the differences of which each entry was kept by chance, and made larger for that.

        m_k ~ Bernoulli(density)
        W   = W_0 + scale sum_k s_k m_k (W_k - W_0) / density

    so that the expectation is task arithmetic's.  What is drawn for an entry depends on the seed,
    the tensor's name, its model's content and where the entry lies in it, and so on nothing else.
    It works where differences are small: the paper saw it fail above about 0.002.

    Args:
        models: The same tensor of every fine-tuned model.
        base: That of the model they were tuned from.
        shares: How much each model counts.
        entries: Where in its tensor each entry lies.
        seeds: A number for each model and tensor.
        density: Probability with which a difference is kept, or one for each model.
        scale: Times all differences together.
        seed: Another one keeps others.
        rescale: Divide by the density.
        normalize: Take shares as fractions of their sum.

    Raises:
        UserError: A density is no fraction, or shares that add up to nothing are to be fractions.
    """
    fractions = share_of_all(shares, normalize).tolist()
    total = base.new_zeros(base.shape)
    kept = dropped(models, base, entries, seeds, density, seed, rescale)
    for difference, share in zip(kept, fractions, strict=True):
        total += difference.mul_(share)
    return total.mul_(scale).add_(base)
