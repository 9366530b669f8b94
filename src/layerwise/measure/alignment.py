"""Representation alignment: whether a block still tells the same tokens apart."""

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
    ),
    unit="block",
)
def alignment(
    outputs: Float[Tensor, "tokens width"],
    base_outputs: Float[Tensor, "tokens other"],
    *,
    centred: bool = False,
) -> float:
    """Score a block by how little the geometry of its answers is that of another model's.

    With the answers H to some tokens, and their kernel, which is the same for H and H Q of any
    rotation Q:

        K = H H^T ,   RA = <K, K_0> / (||K||_F ||K_0||_F)
                         = ||H^T H_0||_F^2 / (||H^T H||_F ||H_0^T H_0||_F)

    1 for the same geometry: learning was lazy.  Rich learning changes it, down to 0.  With
    `centred`, each output less its mean over tokens, this is the linear CKA of Kornblith et al.
    2019 (arXiv:1905.00414): without, answers of one sign (after a ReLU), or a large mean, bring RA
    near 1 whatever they tell apart.

    The score is -RA, as the paper does not say that a block which learned more richly is more
    important: here it is.  Blocks that answer nothing are as good as each other, and no good to
    one that does.  CKA is too high where there are fewer tokens than 4 times the width.

    Args:
        outputs: What the block answers.
        base_outputs: What the other model's block answers to the same tokens.
        centred: Take each output's mean over tokens away.

    Returns:
        Alignment, negated, from -1 (the same geometry) to 0; higher is more important.
    """
    ours, theirs = (_shape(tokens, centred) for tokens in (outputs, base_outputs))
    if not bool(ours.any()) or not bool(theirs.any()):
        return -float(bool(ours.any()) == bool(theirs.any()))
    shared = float((ours.T @ theirs).square().sum())
    whole = float((ours.T @ ours).norm() * (theirs.T @ theirs).norm())
    return -min(1.0, shared / whole)


def _shape(tokens: Float[Tensor, "tokens width"], centred: bool) -> Float[Tensor, "tokens width"]:
    """Answers at a size whose fourth power neither vanishes nor overflows."""
    # Tokens that are all alike differ by rounding, which is no geometry.
    level = direction(tokens)
    if not centred:
        return level
    apart = level - level.mean(dim=0)
    return direction(apart) if float(apart.norm()) > 1e-7 else apart.zero_()
