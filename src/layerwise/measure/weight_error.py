"""Weight error: how far an approximation is from the weight, without any data."""

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import measure
from layerwise.measure._relative import relative


@measure(Paper("A White Paper on Neural Network Quantization", 2021, "2106.08295"))
def weight_error(weight: Float[Tensor, "out in"], approximation: Float[Tensor, "out in"]) -> float:
    """Score a layer by the squared error of its weights, as a share of their energy.

    With E = W - approximation:

        ||E||^2 / ||W||^2

    This is the output error for inputs that are equally large and uncorrelated, and what there
    is to go by without calibration data.

    Unlike the paper, which minimizes the error itself, it is taken relative to the layer's own
    weights.  A layer of zeros has nothing to be relative to: any error in it counts as 1.

    Args:
        weight: The layer before it was approximated.
        approximation: What stands in its place.

    Returns:
        Share of the weight's energy, higher for more damage; 0 is perfect, 1 as bad as no weights.
    """
    before = weight.double()
    missed = (before - approximation.double()).square().sum()
    return relative(float(missed), float(before.square().sum()))
