"""Matrix nuclear norm: over how many directions what leaves a block is spread."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.verbs import measure

_SOURCE = "ours: the paper scores models, and shares out nothing by it"
_OPTIONS = {"allow": {"bits": (2, 4)}, "budget": "3.8bits"}
_CHUNK = 1024  # tokens in float64 at a time


@measure(
    Paper("Large Language Model Evaluation via Matrix Nuclear-Norm", 2024, "2410.10672"),
    unit="block",
    claims=(Claim("zd", "reference-6m/measure", _OPTIONS, 0.05, _SOURCE),),
)
def nuclear_norm(outputs: Float[Tensor, "tokens width"], *, columns: bool = False) -> float:
    """Score a block by how far its tokens are from lying in a few directions.

    Tokens that were compressed lie in few directions, and the sum of the singular values of
    their matrix, the nuclear norm, is small.  With L tokens R_i of width d,

        X_i   = (R_i - mean) / ||R_i - mean||      for each token i
        score = (sum of the singular values of X) / L

    The paper has the sum of the min(L, d) largest column norms stand in for that of the singular
    values, which costs less:

        c_j   = sqrt(sum_i X_ij^2)                 for each entry j of the tokens

    Each sum is at most sqrt(L min(L, d)); that of all c_j is at least the nuclear norm, and equal
    to it if the columns are at right angles.  But the stand-in depends on the basis: tokens
    along a few entries score low, and the same tokens after a rotation nearly as high as noise.

    Unlike the paper, singular values are summed unless `columns` asks for the stand-in.  On the
    blocks of our trained models they rank as the entropy of the tokens' spectrum does, which both
    are to replace; the stand-in is nearly the same at all blocks, and on texts of 64 tokens, fewer
    than the stream is wide, it ranks them in reverse.

    The paper scores a model by its last layer, text by text, and calls lower better; it does not
    rank layers.  Here all calibration tokens of a block are one text, and a block whose outputs
    are spread more is more important, as there is more in them to lose.  It falls with the number
    of tokens: compare scores that were made of equally many.  The paper does not say what a
    token equal to the mean is: here it has no direction, and stays 0.

    Args:
        outputs: The residual stream after the block.
        columns: Sum column norms instead of singular values.

    Returns:
        Norm per token, from 0 (all tokens are equal) to sqrt(min(L, d) / L); higher is spread more.
    """
    tokens, width = outputs.shape
    mean = outputs.mean(dim=0, dtype=torch.float64)  # (width,)
    product = torch.zeros(width, 1 if columns else width, dtype=torch.float64)
    for part in outputs.split(_CHUNK):
        rows = _directions(part.double(), mean)
        product += rows.square().sum(dim=0)[:, None] if columns else rows.T @ rows
    squares = product.flatten() if columns else torch.linalg.eigvalsh(product)
    largest = squares.clamp(min=0).sqrt().topk(min(tokens, width)).values
    return float(largest.sum()) / tokens


def _directions(
    tokens: Float64[Tensor, "tokens width"], mean: Float64[Tensor, " width"]
) -> Float64[Tensor, "tokens width"]:
    """Tokens less their mean, each at length 1, or 0 where it equals the mean but for rounding."""
    centred = tokens - mean
    length = centred.norm(dim=1, keepdim=True)  # (tokens, 1)
    rounding = 1e-12 * tokens.norm(dim=1, keepdim=True)
    return torch.where(length > rounding, centred / length.clamp(min=1e-300), 0.0)
