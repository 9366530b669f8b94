"""Filter orthogonality: how little the outputs of a layer repeat each other."""

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import measure

_CHUNK = 1024  # outputs that are compared with all at a time


@measure(
    Paper(
        "CNN Filter DB: An Empirical Investigation of Trained Convolutional Filters",
        2022,
        "2203.15331",
    )
)
def filter_orthogonality(weight: Float[Tensor, "out in"]) -> float:
    """Score a layer by how nearly the weights of its outputs are at right angles.

    With the N rows of the layer's matrix, each an output's filters one after the other,

        orthogonality = 1 - sum_{a != b} |cos(row_a, row_b)| / (N (N - 1))

    The paper does not say that a layer of higher orthogonality is more important: here it is, as
    no output can stand in for another.  Nor does it say what a row of zeros is: it adds
    nothing to any other, and |cos| is 1.  A single row has nothing to repeat: 1.

    Args:
        weight: The layer; linear ones are as good as convolutions.

    Returns:
        From 0 (all outputs are one, or nothing) to 1 (all are at right angles); higher is more
        important.
    """
    count, largest = len(weight), float(weight.abs().max())
    if largest == 0:
        return 0.0
    if count == 1:
        return 1.0
    level = weight.double() / largest
    length = level.norm(dim=1, keepdim=True)  # (out, 1)
    rows = level / length.clamp(min=1e-300)
    nothing = int((length == 0).sum())
    alike = sum(float((part @ rows.T).abs().sum()) for part in rows.split(_CHUNK))
    # Each row is like itself, and one of zeros like all others.
    alive = count - nothing
    alike += nothing * (nothing - 1) + 2 * nothing * alive - alive
    return 1 - alike / (count * (count - 1))
