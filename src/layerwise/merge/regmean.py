"""RegMean: one layer that answers each model's inputs as that model would."""

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.verbs import merger
from layerwise.merge._differences import share_of_all


@merger(
    Paper("Dataless Knowledge Fusion by Merging Weights of Language Models", 2022, "2212.09849"),
    claims=(
        Claim("linear", "digits-experts/merge", {}, 0.3, "table 2: above averaging everywhere"),
        Claim("linear", "stories260k-tuned/merge", {}, 0.05, "table 2: above averaging everywhere"),
        Claim("fisher", "digits-experts/merge", {}, 0.0, "table 2"),
    ),
)
def regmean(
    models: Float[Tensor, "models ..."],
    shares: Float[Tensor, " models"],
    grams: Float[Tensor, "models in in"] | None,
    *,
    off_diagonal: float = 0.9,
    ridge: float = 1e-4,
) -> Float[Tensor, "..."]:
    """Fit one weight to the outputs of all models, each on its own inputs.

    With G_k the mean of x x^T over what model k's layer reads, whose entries off the diagonal are
    shrunk by a factor, and s_k the shares,

        min_W sum_k s_k tr((W - W_k) G_k (W - W_k)^T)
        W = (sum_k s_k W_k G_k) (sum_k s_k G_k)^-1

    What is solved for is the difference from the average A, with a ridge that pulls towards it:

        (W - A) (sum_k s_k G_k + r I) = sum_k s_k (W_k - A) G_k
        r = ridge mean(diag(sum_k s_k G_k))

    so that directions which no input has keep the average, and copies give the copy; the official
    code inverts without a ridge.  A tensor of which no inputs are known is averaged.

    Args:
        models: The same layer of every model, (out, in), or any other tensor.
        shares: How much each model counts.
        grams: What each model's layer reads; None for what is no layer.
        off_diagonal: Factor for entries off the diagonal: 0.9 in the paper, 0.1 for T5.
        ridge: How strongly the average pulls, as a fraction of the mean input's square.

    Raises:
        UserError: The shares add up to nothing.
    """
    fractions = share_of_all(shares, normalize=True)
    average = models[0].clone()
    for model, share in zip(models[1:], fractions[1:].tolist(), strict=True):
        average += (model - models[0]).mul_(share)
    if grams is None:
        return average
    factor = torch.full(grams.shape[1:], off_diagonal, dtype=torch.float64).fill_diagonal_(1.0)
    together = torch.zeros(grams.shape[1:], dtype=torch.float64)
    pull = torch.zeros(average.shape, dtype=torch.float64)
    for model, gram, share in zip(models, grams, fractions.tolist(), strict=True):
        shrunk = gram.double() * factor * share
        together += shrunk
        pull += (model - average).double() @ shrunk
    damping = ridge * float(together.diagonal().mean())
    if damping <= 0:  # no token reached the layer
        return average
    together.diagonal().add_(damping)
    change = torch.linalg.solve(together, pull, left=False)  # (out, in)
    return average + change.float()
