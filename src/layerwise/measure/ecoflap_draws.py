"""Coarse-to-fine pruning's score by passes forward alone, for models too large to go back."""

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.statistics import check_statistics
from layerwise.core.verbs import measure


@measure(
    Paper(
        "ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models",
        2023,
        "2310.02998",
    )
)
def ecoflap_draws(slopes: Float[Tensor, " windows"]) -> float:
    """Score a layer by what small random changes of its weights did to the model's loss.

    The paper's own estimate: two passes forward for each window, with a draw of noise z,

        S = mean over windows of |(L(W + eps z) - L(W - eps z)) / (2 eps)| ,   z ~ N(0, 1)

    which on average is sqrt(2 / pi) times the mean of the norms of the windows' gradients.
    `ecoflap` reads the gradient of all windows together instead: less noise, and more memory.

    Unlike the authors' code, which moves weights in place and back and adds up over batches, the
    weights are never touched and S is the mean.  As there, the size is taken before the mean, and
    eps is 0.001; losses are those of float32.

    Args:
        slopes: Of the loss of each window along its draw, nats per unit of noise.

    Returns:
        Nats per unit of noise, from 0; higher is more important.

    Raises:
        UserError: A slope is NaN or infinite.
    """
    check_statistics(slopes)
    return float(slopes.double().abs().mean()) if len(slopes) else 0.0
