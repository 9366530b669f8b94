"""Products with a symmetric matrix, of which half need not be computed.

Columns are taken in panels.  What lies left of a panel's own square is the transpose of what other
panels have there, so that a matrix of n columns costs (n + PANEL) / 2n of the whole product.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

PANEL = 256


def _panels(width: int) -> Iterator[slice]:
    for first in range(0, width, PANEL):
        yield slice(first, min(first + PANEL, width))


def add_squares(gram: Float[Tensor, "in in"], inputs: Float[Tensor, "tokens in"]) -> None:
    """Add X^T X to `gram`, all of it but what lies below the panels; see `mirror`."""
    for columns in _panels(len(gram)):
        upper = slice(0, columns.stop)
        gram[upper, columns].addmm_(inputs[:, upper].T, inputs[:, columns])


def mirror(gram: Float[Tensor, "in in"]) -> None:
    """Fill in what lies below the panels from what lies above them."""
    for columns in _panels(len(gram)):
        gram[columns, : columns.start] = gram[: columns.start, columns].T


def squared_lengths(
    matrix: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]
) -> Float[Tensor, " out"]:
    """The form m G m^T of every row m, at least 0."""
    total = torch.zeros(len(matrix), dtype=matrix.dtype)
    for columns in _panels(len(gram)):
        panel = gram[: columns.stop, columns].to(matrix.dtype)
        product = matrix[:, columns] @ panel[columns]
        product.addmm_(matrix[:, : columns.start], panel[: columns.start], alpha=2)
        total += product.mul_(matrix[:, columns]).sum(dim=1)
    return total.clamp_(min=0)
