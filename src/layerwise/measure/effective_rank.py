"""Effective rank: over how many directions a layer's weights are spread."""

import math

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import measure
from layerwise.measure._spectrum import eigenvalues

_SOURCE = "ours: the paper changes the rank of initial weights, and shares out nothing by it"
_OPTIONS = {"allow": {"bits": (2, 4)}, "budget": "3.8bits"}


@measure(
    Paper(
        "How connectivity structure shapes rich and lazy learning in neural circuits",
        2024,
        "2310.08513",
    ),
    claims=(Claim("zd", "reference-6m/measure", _OPTIONS, 0.05, _SOURCE),),
)
def effective_rank(
    weight: Float[Tensor, "out in"], *, order: float = 1.0, power: int = 1, share: bool = False
) -> float:
    """Score a layer by the number of equal singular values that would be spread as its own are.

    Weights of high rank learn lazily: training moves them, and what they make of the data,
    little; those of low rank must change to learn.  With the singular values s,

        p_i  = s_i^power / sum_j s_j^power
        rank = (sum_i p_i^order)^(1 / (1 - order))

    which for `order` 1 is exp(- sum p ln p) (Roy and Vetterli 2007), for 2 is
    (sum s)^2 / sum s^2, and for infinity 1 / max p.  With `power` 2 the eigenvalues of W^T W are
    meant instead: then 2 is their participation ratio, and infinity the stable rank
    ||W||_F^2 / ||W||_2^2.

    The other measures of the paper compare weights (displacement), activity (alignment) or tangent
    kernels (kernel_alignment) before training with those after it, and so need two models.  The
    paper does not say which effective rank is meant, for it sets the rank; nor that one layer is
    more important than another: here one of a higher rank is, as fewer of its directions can go.

    Args:
        weight: The layer.
        order: How much large singular values count above small ones, 0 or more; 0 counts those
            that are not 0.
        power: 1 for singular values, 2 for their squares.
        share: Divide by the rank that the layer could have, the smaller of its sides.

    Returns:
        Effective rank, from 1 to the smaller side of the layer, or as a share of that; 0 for a
        layer of zeros.  Higher is more important.

    Raises:
        UserError: `order` or `power` is none of those above.
    """
    if not order >= 0 or power not in (1, 2):
        raise UserError(
            f"an effective rank of order {order} and power {power} is asked for.",
            "Give an order of 0 or more, and power 1 or 2.",
        )
    parts = eigenvalues(weight) ** (power / 2)  # (rank,)
    if not len(parts):
        return 0.0
    parts = parts / parts.sum()
    if order == 1:
        entropy = -float((parts * parts.log()).sum())
    elif math.isinf(order):
        entropy = -math.log(float(parts.max()))
    else:
        entropy = float((order * parts.log()).logsumexp(dim=0)) / (1 - order)
    return math.exp(entropy) / (min(weight.shape) if share else 1)
