"""Output error: how much of a layer's answer an approximation gets wrong."""

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import measure
from layerwise.measure._relative import relative


@measure(
    Paper(
        "Optimal Brain Compression: A Framework for Accurate Post-Training Quantization and "
        "Pruning",
        2022,
        "2208.11580",
    )
)
def error(
    weight: Float[Tensor, "out in"],
    approximation: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
) -> float:
    """Score a layer by the squared error of its outputs, as a share of their energy.

    Over the calibration tokens, with E = W - approximation:

        ||E X||^2 / ||W X||^2 = trace(E gram E^T) / trace(W gram W^T)

    Unlike the paper, which minimizes the error itself, it is taken relative to the
    layer's own outputs.  A layer that answers 0 has nothing to be relative to: any error in it
    counts as 1.  On inputs that were never seen there is no error: it counts as 0.

    Args:
        weight: The layer before it was approximated.
        approximation: What stands in its place.
        gram: Mean of x x^T over tokens.

    Returns:
        Share of the output's energy, higher for more damage; 0 is perfect, 1 as bad as no answer.
    """
    before, second_moment = weight.double(), gram.double()
    change = before - approximation.double()
    # Rounding can leave an energy just below zero.
    missed, whole = (
        max(float((part @ second_moment * part).sum()), 0.0) for part in (change, before)
    )
    return relative(missed, whole)
