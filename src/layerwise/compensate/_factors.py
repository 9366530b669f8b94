"""The best low-rank factors of a matrix, balanced between the two."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.errors import UserError


def split_best(
    matrix: Float[Tensor, "out in"], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """The closest product of that rank: U_r sqrt(S_r) and sqrt(S_r) V_r^T.

    Raises:
        UserError: The matrix has no such rank.
    """
    most = min(matrix.shape)
    if not 1 <= rank <= most:
        raise UserError(
            f"rank {rank} does not suit a layer of {matrix.shape[0]} x {matrix.shape[1]}.",
            f"Choose a rank from 1 to {most}.",
        )
    left, values, right = cast(
        "tuple[Tensor, Tensor, Tensor]", torch.linalg.svd(matrix, full_matrices=False)
    )
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]
