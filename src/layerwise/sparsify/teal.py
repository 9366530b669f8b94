"""TEAL: inputs of small magnitude are not multiplied."""

from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import sparsifier
from layerwise.sparsify._keep import count, keep_highest


@sparsifier(Paper("Training-Free Activation Sparsity in Large Language Models", 2024, "2408.14690"))
def teal(activations: Float[Tensor, "tokens in"], *, density: float) -> Bool[Tensor, "tokens in"]:
    """Keep the inputs of each token that are largest in magnitude, whatever multiplies them.

        kept = the k largest |x_i| ,   k = round(density in)

    Unlike the paper, which cuts at a threshold found on a calibration text, so that tokens keep
    unequal numbers, each token keeps the same number: what WINA compares with, and no text is
    needed.

    Args:
        activations: What a layer reads.
        density: Fraction of a token's inputs to keep, above 0.

    Returns:
        True where an input is kept.

    Raises:
        UserError: The density is outside (0, 1].
    """
    kept = count(density, activations.shape[1])
    return keep_highest(activations.float().abs(), kept)
