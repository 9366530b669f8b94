"""TIES: trim, elect signs, and average what agrees."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.verbs import merger
from layerwise.merge._differences import elected


@merger(
    Paper("TIES-Merging: Resolving Interference When Merging Models", 2023, "2306.01708"),
    rows="entry",
    claims=(
        Claim("linear", "digits-experts/merge", {"density": 0.5, "scale": 0.7}, 0.0, "table 1"),
        Claim("linear", "stories260k-tuned/merge", {"density": 0.5}, 0.0, "table 1"),
    ),
)
def ties(
    models: Float[Tensor, "models ..."],
    base: Float[Tensor, "..."],
    shares: Float[Tensor, " models"],
    cuts: Float[Tensor, " models"],
    *,
    density: float | Sequence[float] = 0.2,
    scope: Literal["model", "tensor"] = "model",
    scale: float = 1.0,
    normalize: bool = True,
) -> Float[Tensor, "..."]:
    """Merge the large differences from the base that agree in sign.

    With d_k = W_k - W_0, and s_k the shares:

    1. Trim: d_k is set to 0 where |d_k| is below the cut c_k, the magnitude of its
       round(density N)-th largest entry among N.
    2. Elect: sign = sign(sum_k s_k d_k), positive where the sum is 0.
    3. Average what agrees: d = sum of s_k d_k / sum of s_k, over k with d_k != 0 and the sign.
    4. W = W_0 + scale d.

    Of entries as large as the cut all stay, so that equal inputs give equal bytes; where
    differences are coarse that is a little more than `density`.  Unlike here, the paper gives a sum
    of exactly 0 the sign that most entries have.

    Args:
        models: The same tensor of every fine-tuned model.
        base: That of the model they were tuned from.
        shares: How much each model counts.
        cuts: What `density` comes to, for each model.
        density: Fraction of the differences that is kept, or one for each model.
        scope: Find the largest of the whole model, as the paper does, or of each tensor.
        scale: Times the merged difference.
        normalize: Average what agrees; otherwise it is added up.
    """
    kept = [_kept(model - base, cut) for model, cut in zip(models, cuts.tolist(), strict=True)]
    return elected(kept, shares, normalize).mul_(scale).add_(base)


def _kept(difference: Float[Tensor, "..."], cut: float) -> Float[Tensor, "..."]:
    """A difference with 0.0 where it is below the cut; hardshrink keeps what is above its own."""
    if cut == 0:
        return difference
    below = torch.nextafter(torch.tensor(cut), torch.tensor(0.0))
    return functional.hardshrink(difference, float(below))
