"""Plain low-rank compensation: the baseline every other compensator is measured against."""

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.compensate._factors import split_best
from layerwise.core.catalogue import Paper
from layerwise.core.results import LowRank
from layerwise.core.verbs import compensator


@compensator(
    Paper(
        "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to "
        "Low Rank Compensation",
        2023,
        "2303.08302",
    ),
    nested=True,
)
def svd(
    weight: Float[Tensor, "out in"], approximation: Float[Tensor, "out in"], *, rank: int
) -> LowRank:
    """Add back the largest part of the error that two thin matrices can hold.

    The error is cut off after its `rank` largest singular values, which leaves the least
    squared error of all corrections of that rank (Eckart and Young):

        W - approximation = U S V^T ,   left = U_r sqrt(S_r) ,   right = sqrt(S_r) V_r^T

    This is the paper's LoRC to the letter, which ZeroQuant-FP (2307.09782) takes over with a rank
    of 8: it reads no inputs, and is found once the codes are final.

    Args:
        weight: The layer before it was approximated.
        approximation: What stands in its place.
        rank: Width of the correction, from 1 to min(out, in).

    Raises:
        UserError: The layer has no such rank.
    """
    left, right = split_best(weight.double() - approximation.double(), rank)
    stored = torch.promote_types(weight.dtype, torch.float32)
    return LowRank(left.to(stored), right.to(stored))
