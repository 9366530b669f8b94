"""SparseGPT: prune column by column, and let the columns to the right make up for it."""

from collections.abc import Iterator
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.cholesky import upper_root
from layerwise.core.errors import UserError
from layerwise.core.results import Pruned
from layerwise.core.verbs import pruner
from layerwise.prune._mask import check_density, keep_highest

_SOURCE = "Wanda README: LLaMA2-7B at 50%, perplexity 6.51 against 14.89 (dense 5.12)"


@pruner(
    Paper(
        "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        2023,
        "2301.00774",
    ),
    claims=(
        Claim("magnitude", "bytes-wikitext/prune", {"density": 0.5}, 0.2, _SOURCE),
        Claim("magnitude", "stories-char-940k/prune", {"density": 0.5}, 0.2, _SOURCE),
        Claim("magnitude", "reference-6m/prune", {"density": 0.4}, 0.2, _SOURCE),
        Claim("magnitude", "builtin-tiny/prune", {"density": 0.4}, 0.2, _SOURCE),
    ),
)
def sparsegpt(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    density: float,
    among: int = 0,
    damping: float = 0.01,
    block: int = 128,
) -> Pruned:
    """Remove the weights whose loss the rest of their row can best make up for.

    Columns are visited from left to right.  Removing a weight moves the weights to its right
    by the optimal brain surgeon's update; as every row visits the columns in the same order,
    one triangular factor of the inverse Hessian serves all rows:

        H = gram + damping * mean(diag gram over live inputs) * I = R R^T
        U = R^-1 upper triangular
        removed where W_ij^2 / U_jj^2 is lowest
        W_i,j: -= W_ij / U_jj * U_j,j:

    The weights to remove are chosen once per `block` of columns, over all its rows together,
    from the weights as they stand when the block is reached.  U is only formed block by block:
    with D the total change to the columns on the left, a block starts from

        W_block + D R_left,block U_block,block ,

    which is the same update without the inverse of H.  That factor is made in float64.

    Unlike the paper, a column whose input is always zero is not set to zero: it scores 0, so it
    goes first and counts towards the density.  Unlike the authors' code, which sets the diagonal
    of dead inputs to 1 before it takes the mean, they have no part in the mean.  The paper does
    not say how to round: blocks share the rounding so that the layer keeps
    round(density * out * in).

    Args:
        weight: Layer to prune.
        gram: Mean of x x^T over tokens.
        density: Fraction of weights to keep, in (0, 1].
        among: Choose within windows of this many consecutive inputs of a row, instead of
            blocks: density 0.5 among 4 is the 2:4 pattern.  0 for blocks.
        damping: Added to the diagonal, as a fraction of its mean over live inputs; ten times
            more, and a note, as often as H does not factor.
        block: Columns that share one choice.

    Raises:
        UserError: An option is out of range, a statistic is NaN or infinite, or H does not
            factor.
    """
    check_density(density, weight.shape[1], among)
    if block < 1:
        raise UserError(f"block is {block}.", "Give 1 or more.")
    # float64 weights, which only tests have, stay float64.
    before = weight.to(torch.promote_types(weight.dtype, torch.float32))
    root = upper_root(gram, damping)
    factor, dead = root.factor.to(before.dtype), root.dead
    unseen = ("no input was seen: pruned by magnitude",) if bool(dead.all()) else ()
    change, kept = torch.zeros_like(before), torch.zeros_like(before, dtype=torch.bool)
    for columns in _slices(weight.shape[1], among or block):
        diagonal_block = factor[columns, columns]
        identity = torch.eye(len(diagonal_block)).to(diagonal_block)
        inverse = cast(
            "Tensor", torch.linalg.solve_triangular(diagonal_block, identity, upper=True)
        )
        left = slice(0, columns.start)
        current = before[:, columns] + change[:, left] @ factor[left, columns] @ inverse
        # An input that was never seen costs nothing to lose, unless no input was seen at all.
        importance = diagonal_block.diagonal().masked_fill(dead[columns] & ~dead.all(), 0.0)
        kept[:, columns] = _choose(current.abs() * importance, density, columns, among)
        current = _sweep(current, kept[:, columns], inverse)
        change[:, columns] = before[:, columns] - current
    return Pruned(kept, (before - change).where(kept, 0.0), (*unseen, *root.notes))


def _slices(width: int, step: int) -> Iterator[slice]:
    for start in range(0, width, step):
        yield slice(start, min(start + step, width))


def _choose(
    scores: Float[Tensor, "out block"], density: float, columns: slice, among: int
) -> Bool[Tensor, "out block"]:
    """True where a weight stays: per row of a window, or over the block as a whole."""
    if among:
        return keep_highest(scores, round(density * among))
    rows = len(scores)
    count = round(density * rows * columns.stop) - round(density * rows * columns.start)
    return keep_highest(scores.reshape(1, -1), count).reshape(scores.shape)


def _sweep(
    weight: Float[Tensor, "out block"],
    kept: Bool[Tensor, "out block"],
    inverse: Float[Tensor, "block block"],
) -> Float[Tensor, "out block"]:
    """The block after each removed weight's error was carried to the right."""
    after = weight.clone()
    for column in range(after.shape[1]):
        error = after[:, column].masked_fill(kept[:, column], 0.0) / inverse[column, column]
        after[:, column:] -= error[:, None] * inverse[column, column:]
    return after.where(kept, 0.0)
