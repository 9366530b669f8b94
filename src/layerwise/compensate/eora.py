"""EoRA: low-rank compensation that spends its rank where the inputs are."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.compensate._factors import split_best
from layerwise.core.catalogue import Claim, Paper
from layerwise.core.results import LowRank
from layerwise.core.statistics import check_statistics
from layerwise.core.verbs import compensator

_SOURCE = "abstract: outperforms prior training-free low-rank methods, LLaMA3-8B at 3 bits"


@compensator(
    Paper(
        "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank "
        "Approximation",
        2024,
        "2410.21271",
    ),
    nested=True,
    claims=(
        Claim("svd", "bytes-wikitext/compensate", {"rank": 8}, 0.25, _SOURCE),
        Claim("svd", "stories-char-940k/compensate", {"rank": 8, "group": 32}, 0.25, _SOURCE),
        Claim("svd", "builtin-tiny/compensate", {"rank": 8}, 0.25, _SOURCE),
    ),
)
def eora(
    weight: Float[Tensor, "out in"],
    approximation: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    rank: int,
) -> LowRank:
    """Add back the part of the error that the layer's inputs would notice most.

    The correction B A of that rank with the least output error over the calibration tokens,
    ||(W - approximation - B A) X||, is a singular value decomposition in the eigenspace of
    the inputs:

        gram = Q L Q^T
        (W - approximation) Q sqrt(L) = U S V^T
        B = U_r sqrt(S_r) ,   A = sqrt(S_r) V_r^T inverse(sqrt(L)) Q^T

    All in float64.  Unlike the paper's code, which raises negative eigenvalues to the smallest
    positive one, those below in * eps * max(L), with eps of float32, are cut off in both roots:
    along a direction that no input takes there is nothing to correct.

    Args:
        weight: The layer before it was approximated.
        approximation: What stands in its place.
        gram: Mean of x x^T over tokens.
        rank: Width of the correction, from 1 to min(out, in).

    Raises:
        UserError: The layer has no such rank, or a statistic is NaN or infinite.
    """
    check_statistics(gram)
    values, vectors = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(gram.double()))
    seen = values > len(values) * torch.finfo(torch.float32).eps * values[-1]
    root = values.where(seen, 0.0).sqrt()
    inverse_root = values.where(seen, torch.inf).rsqrt()
    error = weight.double() - approximation.double()
    left, right = split_best(error @ vectors * root, rank)
    right = right * inverse_root @ vectors.T
    unseen = int((~seen).sum())
    note = f"{unseen} of {len(seen)} input directions were never seen: not corrected there"
    stored = torch.promote_types(weight.dtype, torch.float32)
    return LowRank(left.to(stored), right.to(stored), (note,) if unseen else ())
