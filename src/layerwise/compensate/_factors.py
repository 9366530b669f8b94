"""The best low-rank factors of a matrix, balanced between the two."""

from typing import cast

import torch
from jaxtyping import Float64
from scipy import linalg
from torch import Tensor

from layerwise.core.errors import UserError

# Above this share of all its singular values, a matrix is decomposed whole.
_FEW = 0.25


def split_best(
    matrix: Float64[Tensor, "out in"], rank: int
) -> tuple[Float64[Tensor, "out rank"], Float64[Tensor, "rank in"]]:
    """The closest product of that rank: U_r sqrt(S_r) and sqrt(S_r) V_r^T.

    Of few singular values only those are found, as the largest eigenvalues of the smaller one of
    M M^T and M^T M, in float64: what squaring loses is far below a float32's last digit.

    Raises:
        UserError: The matrix has no such rank.
    """
    most = min(matrix.shape)
    if not 1 <= rank <= most:
        raise UserError(
            f"rank {rank} does not suit a layer of {matrix.shape[0]} x {matrix.shape[1]}.",
            f"Choose a rank from 1 to {most}.",
        )
    if rank > _FEW * most:
        left, values, right = cast(
            "tuple[Tensor, Tensor, Tensor]", torch.linalg.svd(matrix, full_matrices=False)
        )
        root = values[:rank].sqrt()
        return left[:, :rank] * root, root[:, None] * right[:rank]
    if matrix.shape[0] > matrix.shape[1]:
        right, left = split_best(matrix.T, rank)
        return left.T, right.T
    values, vectors = linalg.eigh(
        (matrix @ matrix.T).numpy(), subset_by_index=(most - rank, most - 1)
    )
    left = torch.from_numpy(vectors).flip(1)  # (out, rank), the largest first
    # The fourth root of an eigenvalue is the root of a singular value; a matrix of less rank has
    # eigenvalues that rounding left, along which there is nothing to split.
    values = torch.from_numpy(values).flip(0).clamp(min=0)
    seen = values > most * torch.finfo(torch.float64).eps * values[0]
    root = values.where(seen, 0.0).pow(0.25)
    inverse_root = values.where(seen, torch.inf).pow(-0.25)
    return left * root, inverse_root[:, None] * (left.T @ matrix)
