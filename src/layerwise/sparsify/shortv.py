"""ShortV: blocks that contribute little leave a group of tokens as it is."""

from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import sparsifier
from layerwise.sparsify._keep import count, keep_highest


@sparsifier(
    Paper(
        "ShortV: Efficient Multimodal Large Language Models by Freezing Visual Tokens in "
        "Ineffective Layers",
        2025,
        "2504.00502",
    )
)
def shortv(scores: Float[Tensor, " blocks"], *, density: float) -> Bool[Tensor, " blocks"]:
    """Choose the blocks that still work on a group of tokens, by what they contribute to it.

    The contribution of a block is how far the distribution of the next token moves when that block
    alone leaves the group's hidden states as they are:

        LC_l = KL(q_l || p) = sum of q_l (log q_l - log p)

    with p the model's answer at the last position and q_l that with block l frozen, its mean over
    calibration texts.  Where a block is frozen, no query, attention or MLP is computed for a token
    of the group; the others still read its keys and values, made of the state it came with.

    Unlike the paper, whose group is the tokens of a picture, the group is any set of positions: of
    a text, its first part.  Scores are of one block at a time, as there; freezing several adds up
    in ways that they do not foresee.

    Args:
        scores: Contribution of each block; the least are frozen.
        density: Fraction of the blocks that work on the group, above 0.

    Returns:
        True where a block works on the group.

    Raises:
        UserError: The density is outside (0, 1].
    """
    return keep_highest(scores.float(), count(density, len(scores)))
