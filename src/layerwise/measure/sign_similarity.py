"""Sign similarity: whether a block's outputs are on the same side of zero as another model's."""

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import measure


@measure(
    Paper(
        "How connectivity structure shapes rich and lazy learning in neural circuits",
        2024,
        "2310.08513",
    ),
    unit="block",
)
def sign_similarity(
    outputs: Float[Tensor, "tokens width"], base_outputs: Float[Tensor, "tokens width"]
) -> float:
    """Score a block by how few of its outputs have the sign of another model's.

        share = mean over tokens and outputs of [sign(h) = sign(h_0)]

    with the signs -1, 0 and 1: 1 of learning so lazy that nothing changed side, about 1/2 of
    outputs that have nothing to do with each other.  Where a ReLU follows, it is the share of units
    that are still on or still off.

    The score is -share, as for the paper's alignment of kernels: a block that learned more richly
    counts as more important, which the paper does not say.

    Args:
        outputs: What the block answers.
        base_outputs: What the other model's block answers to the same tokens.

    Returns:
        Share, negated, from -1 (the same signs) to 0; higher is more important.
    """
    alike = outputs.sign() == base_outputs.sign()
    return -float(alike.double().mean()) if alike.numel() else -1.0
