"""Kernel alignment: whether a layer still learns the same from each example."""

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import measure
from layerwise.measure._between import direction


@measure(
    Paper(
        "How connectivity structure shapes rich and lazy learning in neural circuits",
        2024,
        "2310.08513",
    )
)
def kernel_alignment(
    tangents: Float[Tensor, "samples features"], base_tangents: Float[Tensor, "samples features"]
) -> float:
    """Score a layer by how little its tangent kernel is that of another model's.

    With the gradients J of some answers by the layer's weight, a row for each, and the kernel of
    all pairs of answers, uncentred as in the official code:

        K = J J^T ,   KA = <K, K_0> / (||K||_F ||K_0||_F)

    1 where a step on one example moves all answers as it did: learning was lazy, the model is
    linear in the layer's weights.  Rich learning changes the kernel.

    The official code takes every output of a small network; here answers are the last logits of
    windows along a few random directions, and gradients of large layers are projected on random
    directions, which keeps products up to some per cent.

    The score is -KA, as the paper does not say that a layer which learned more richly is more
    important: here it is.  Layers that nothing depends on are as good as each other, and no good
    to one that something does.

    Args:
        tangents: Gradient of each answer by the weight.
        base_tangents: The same of the other model.

    Returns:
        Alignment, negated, from -1 (the same kernel) to 0; higher is more important.
    """
    ours, theirs = direction(tangents), direction(base_tangents)
    if not bool(ours.any()) or not bool(theirs.any()):
        return -float(bool(ours.any()) == bool(theirs.any()))
    first, second = ours @ ours.T, theirs @ theirs.T  # (samples, samples) each
    return -min(1.0, float((first * second).sum() / (first.norm() * second.norm())))
