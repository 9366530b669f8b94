"""WINA: inputs that, with the weights that multiply them, add little to a layer's output."""

from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.verbs import sparsifier
from layerwise.sparsify._keep import count, keep_highest

_TURNED = {"density": 0.5, "orthogonal": True}
_SOURCE = "abstract: up to 2.94% higher average accuracy than TEAL at equal sparsity"


@sparsifier(
    Paper(
        "WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference",
        2025,
        "2505.19427",
    ),
    claims=(
        Claim("teal", "reference-6m/sparsify", {"density": 0.5}, 0.05, _SOURCE),
        Claim("teal", "reference-6m/sparsify", {"density": 0.35}, 0.05, _SOURCE),
        Claim("teal", "stories-char-940k/sparsify", {"density": 0.5}, 0.05, _SOURCE),
        Claim("teal", "reference-6m/sparsify", _TURNED, 0.05, _SOURCE),
        Claim("teal", "stories-char-940k/sparsify", _TURNED, 0.05, _SOURCE),
    ),
)
def wina(
    activations: Float[Tensor, "tokens in"], columns: Float[Tensor, " in"], *, density: float
) -> Bool[Tensor, "tokens in"]:
    """Keep the inputs of each token whose products with the weights are largest.

    Without input i, the output y = W x loses x_i W_:,i, a vector of length |x_i| ||W_:,i||_2:

        c_i  = ||W_:,i||_2
        kept = the k largest |x_i| c_i ,   k = round(density in)

    If the columns of W are orthogonal the squared error is the sum of (x_i c_i)^2 over what is
    dropped, and no other k inputs err less (`orthogonal` turns inputs so that they are).

    Unlike the authors' code, which has c_i of k_proj and gate_proj alone and counts 1 elsewhere,
    every matrix has the norms of its own columns, as the paper's text has it; and k is rounded to
    the nearest, not down.  As there, the first hundredth of a text is left dense (`first`), and
    layers that read the same input each choose for themselves.

    Args:
        activations: What a layer reads.
        columns: Norms of the columns of its weight.
        density: Fraction of a token's inputs to keep, above 0.

    Returns:
        True where an input is kept.

    Raises:
        UserError: The density is outside (0, 1].
    """
    kept = count(density, activations.shape[1])
    return keep_highest(activations.float().abs() * columns.float(), kept)
