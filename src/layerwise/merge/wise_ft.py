"""WiSE-FT: between a model and what fine-tuning made of it."""

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.verbs import merger


@merger(
    Paper(
        "Spurious Feature Diversification Improves Out-of-distribution Generalization",
        2023,
        "2309.17230",
    ),
    rows="entry",
    claims=(
        Claim("tuned", "digits-shifted/merge", {}, 0.1,
              "card 066 A: 3 points above the tuned network on other kinds of pictures"),
        Claim("unsmoothed", "digits-shifted/merge", {"smoothing": 0.1}, 0.016,
              "card 066 B, BANG: 0.4 points more where labels were smoothed by 0.1"),
    ),
)  # fmt: skip
def wise_ft(
    models: Float[Tensor, "1 ..."], base: Float[Tensor, "..."], *, alpha: float = 0.5
) -> Float[Tensor, "..."]:
    """Go part of the way from a model to what fine-tuning made of it.

        W = (1 - alpha) W_0 + alpha W_1 = W_0 + alpha (W_1 - W_0)

    Both lean on features that fail elsewhere, but on different ones, so that data unlike those of
    the fine-tuning are answered better.  Choose alpha on data like those of the fine-tuning.  BANG,
    of the same paper, fine-tunes with labels smoothed by 0.1, so that the tuned model does not
    outvote the other; the merge is this one.

    Args:
        models: The tensor of the fine-tuned model alone.
        base: That of the model before.
        alpha: How far to go; 0 and 1 give either bit for bit.
    """
    if alpha in (0, 1):
        return (models[0] if alpha else base).clone()
    return (models[0] - base).mul_(alpha).add_(base)
