"""Spherical interpolation: along the arc between two tensors, not the chord."""

import math

from jaxtyping import Float, Float64
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.verbs import merger
from layerwise.merge._differences import share_of_all

# Above this the arc and the chord are the same to within float32.
_STRAIGHT = 0.9995


@merger(
    Paper("Animating Rotation with Quaternion Curves", 1985),
    rows="entry",
    claims=(
        Claim("ingredients", "digits-specialists/merge", {}, 0.18,
              "card 920: 7 points above the mean of two specialists on the pictures of both"),
    ),
)  # fmt: skip
def slerp(
    models: Float[Tensor, "2 ..."],
    shares: Float[Tensor, " 2"],
    products: Float64[Tensor, "2 2"],
) -> Float[Tensor, "..."]:
    """Go from one tensor to another along the arc between their directions.

    Tensors count as vectors, whatever their shape.  With t the second's share of both,

        cos a = <A, B> / (|A| |B|)
        W     = [sin((1 - t) a) A + sin(t a) B] / sin a

    on the tensors as they are, not scaled to length 1.  Where |cos a| > 0.9995 it is the chord,
    A + t (B - A); so it is where either is all zero and has no direction: the arc would shorten
    the other, so unlike implementations that guard the norm with a small number, this does not.
    Nearly opposite tensors take the chord, too, and can come out near zero.

    Args:
        models: The same tensor of both models.
        shares: How much each counts; a share of 0 leaves the other as it is.
        products: Their inner products over the whole tensor.

    Raises:
        UserError: The shares add up to nothing.
    """
    first, second = models
    near, far = share_of_all(shares, normalize=True).tolist()
    if not near or not far:
        return (second if far else first).clone()
    lengths = math.sqrt(float(products[0, 0]) * float(products[1, 1]))
    cosine = float(products[0, 1]) / lengths if lengths else 1.0
    if abs(cosine) > _STRAIGHT:
        return first + (second - first).mul_(far)
    angle = math.acos(cosine)
    return first * (math.sin(near * angle) / math.sin(angle)) + second * (
        math.sin(far * angle) / math.sin(angle)
    )
