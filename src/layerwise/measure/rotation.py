"""Layer rotation: how far a layer's weights have turned from where they started."""

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import measure
from layerwise.measure._between import direction


@measure(
    Paper(
        "Layer rotation: a surprisingly powerful indicator of generalization in deep networks?",
        2018,
        "1806.01603",
    )
)
def rotation(weight: Float[Tensor, "out in"], base: Float[Tensor, "out in"]) -> float:
    """Score a layer by the cosine distance of its weights from their start.

    With all weights of a layer as one vector, w now and w_0 then:

        r = 1 - <w, w_0> / (||w|| ||w_0||)

    0 for a layer that was never trained, or only grew; 1 for one at right angles to its start,
    which the paper finds near the best at the end of training, in all layers, provided that the
    training loss is low: noise alone turns a wide layer as far.  The start is the initialization,
    or what was fine-tuned.

    The paper does not say that a layer which turned further is more important: here it is, as
    more of what it does was learned since.  Nor what a layer of zeros counts, as an adapter may
    start: it has no direction, and is taken as at right angles to any other; two such as equal.

    Args:
        weight: The layer.
        base: The same layer at its start.

    Returns:
        Cosine distance, from 0 to 2; higher is more important.
    """
    now, then = direction(weight), direction(base)
    if bool((now == then).all()):
        return 0.0
    # Half the squared distance of two directions loses no digits where they are nearly the same.
    apart = float((now - then).square().sum()) / 2
    return apart if bool(now.any()) and bool(then.any()) else 1.0
