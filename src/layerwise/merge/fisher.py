"""Fisher merging: an average in which each entry counts as much as it matters."""

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.verbs import merger
from layerwise.merge._differences import share_of_all


@merger(
    Paper("Merging Models with Fisher-Weighted Averaging", 2021, "2111.09832"),
    rows="entry",
    claims=(
        Claim("linear", "digits-experts/merge", {}, 0.0, "figure 2: above averaging"),
        Claim("linear", "stories260k-tuned/merge", {}, 0.0, "figure 2: above averaging"),
    ),
)
def fisher(
    models: Float[Tensor, "models ..."],
    shares: Float[Tensor, " models"],
    fishers: Float[Tensor, "models ..."] | None,
    *,
    floor: float = 1e-6,
) -> Float[Tensor, "..."]:
    """Average the models, each entry weighted by its Fisher information.

    With F_k the mean over examples of (d log p(y|x) / d W)^2, y drawn from the model's own answer,
    and of length 1 over all of a model,

        W = sum_k s_k F_k W_k / sum_k s_k F_k = W_1 + sum_k s_k F_k (W_k - W_1) / sum_k s_k F_k

    the most likely weights under each model's Gaussian posterior.  F_k is not below the floor, so
    that entries which matter to no model are averaged.  Tensors of which it is not known, such as
    buffers, are averaged.

    Args:
        models: The same tensor of every model.
        shares: How much each model counts.
        fishers: Fisher information of its entries; None for a tensor that is no parameter.
        floor: Least information that an entry counts as.

    Raises:
        UserError: The shares add up to nothing.
    """
    fractions = share_of_all(shares, normalize=True).tolist()
    first = models[0]
    moved, weight = torch.zeros_like(first), torch.zeros_like(first)
    for place, (model, share) in enumerate(zip(models, fractions, strict=True)):
        known = torch.ones_like(first) if fishers is None else fishers[place].clamp(min=floor)
        known *= share
        weight += known
        moved += (model - first).mul_(known)
    return moved.div_(weight).add_(first)
