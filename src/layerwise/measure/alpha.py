"""Alpha: how heavy the tail of a layer's eigenvalues is."""

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import measure
from layerwise.measure._spectrum import Start, eigenvalues, heaviness

_SOURCE = (
    "ours, after AlphaPruning (2410.10912): what goes by alpha of each layer beats what goes by "
    "other figures of its weights"
)
_OPTIONS = {"allow": {"bits": (2, 4)}, "budget": "3.8bits"}


@measure(
    Paper(
        "Predicting trends in the quality of state-of-the-art neural networks without access to "
        "training or testing data",
        2021,
        "2002.06716",
    ),
    claims=(Claim("zd", "reference-6m/measure", _OPTIONS, 0.05, _SOURCE),),
)
def alpha(weight: Float[Tensor, "out in"], *, start: Start = "ks", positions: int = 1) -> float:
    """Score a layer by the exponent of the power law that its largest eigenvalues follow.

    Training makes weights correlate, which shows in the eigenvalues lambda of W^T W: those of
    noise end at an edge, those of a well trained layer reach far beyond, and their density falls
    as lambda^-alpha.  From 2 to 6 is usual; a layer above 6 has learned little.  With the n
    eigenvalues ascending, the likeliest exponent of the tail that starts at the i-th, and the
    tail's Kolmogorov-Smirnov distance from that law, are

        alpha_i = 1 + (n - i) / sum_{j >= i} ln(lambda_j / lambda_i)
        D_i     = max_{j >= i} | 1 - (lambda_j / lambda_i)^(1 - alpha_i) - (j - i) / (n - i) |

    and alpha is that of the start with the least D.

    Unlike the paper, the score is -alpha, so that higher is more important.  Unlike the authors'
    code (WeightWatcher), which drops eigenvalues below 1e-5, those below 1e-10 of the largest are
    dropped, and the lower bound of "peak" is 0.95 of the mode and not the logarithm of that: so
    alpha does not change when a layer is rescaled.  The paper does not say what a layer without a
    tail has (fewer than 10 eigenvalues, or all equal): here alpha is 100, and never more.

    What else the authors' code prints follows from the same tail: its standard error is
    (alpha - 1) / sqrt(size).  The tail of fewer than 100 eigenvalues is a guess.

    Args:
        weight: The layer.
        start: Where the tail starts: "ks" as above; "mid" at the median, which is fast and steady;
            "peak" where D is least between 0.95 and 1.5 times the most frequent eigenvalue.
        positions: Entries of a convolution's kernel, 9 if it is 3 x 3: the eigenvalues of
            the matrices at each of them are pooled, as the authors do.  1 takes the layer as one
            matrix.

    Returns:
        -alpha, from -100 to -1; higher is heavier and more important.

    Raises:
        UserError: `positions` does not divide the width of the layer.
    """
    if positions < 1 or weight.shape[1] % positions:
        raise UserError(
            f"a layer of width {weight.shape[1]} has no kernels of {positions} entries.",
            "Give the height times the width of the kernel, or 1.",
        )
    slices = weight.unflatten(1, (-1, positions)).unbind(dim=2)  # (out, channels) each
    pooled = torch.cat([eigenvalues(one) for one in slices]).sort().values  # (n,)
    return heaviness(pooled, start)
