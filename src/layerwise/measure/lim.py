"""Layer input modification: how far a block turns what passes through it."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.verbs import measure

_SOURCE = (
    "ours: the paper ranks neither above the other; on this model only lim orders the blocks "
    "rightly"
)
# Two of the three blocks keep 4 bits: which two is the measure's to say.
_OPTIONS = {"allow": {"bits": (2, 4)}, "budget": "3.64bits"}


@measure(
    Paper(
        "Layer-Wise Quantization: A Pragmatic and Effective Method for Quantizing LLMs Beyond "
        "Integer Bit-Levels",
        2024,
        "2406.17415",
    ),
    unit="block",
    claims=(Claim("zd", "bytes-wikitext/measure", _OPTIONS, 0.15, _SOURCE),),
)
def lim(inputs: Float[Tensor, "tokens width"], outputs: Float[Tensor, "tokens width"]) -> float:
    """Score a block by how little of its input's direction survives.

    A block that passes the residual stream on unchanged can be coarse without harm; one that
    turns it does work that must be kept:

        LIM = - mean over tokens t of cos(X_t, Y_t)

    The paper does not say whether the cosine is of each token or of all of them at once; it is
    taken per token.  Nor does it say what a token of zeros counts: here 0, as if at right
    angles.

    Args:
        inputs: The residual stream before the block.
        outputs: The residual stream after it.

    Returns:
        Mean cosine, negated, from -1 (nothing is turned) to 1; higher is more important.
    """
    before, after = _directions(inputs), _directions(outputs)
    return -float((before * after).sum(dim=1, dtype=torch.float64).mean())


def _directions(tokens: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
    """Every token at length 1, or 0 where it has no direction."""
    # Brought to a largest entry of 1 first: the square of a tiny token would vanish.
    tiny = torch.finfo(torch.float32).tiny
    level = tokens.float() / tokens.float().abs().amax(dim=1, keepdim=True).clamp(min=tiny)
    return functional.normalize(level, dim=1, eps=tiny)
