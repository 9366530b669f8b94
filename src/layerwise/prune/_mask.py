"""Which weights to keep, given a score for each: exact counts, ties to the earlier weight."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core.errors import UserError


def check_density(density: float, width: int, among: int) -> None:
    """Refuse a density that cannot be met in rows of `width` inputs.

    Raises:
        UserError: The density is outside (0, 1], or not a whole number of weights of every
            `among` inputs, or the windows do not divide a row.
    """
    if not 0 < density <= 1:
        raise UserError(f"density {density} is outside (0, 1].", "Give the fraction to keep.")
    if among < 0 or (among and width % among):
        raise UserError(
            f"rows of {width} inputs do not divide into windows of {among}.",
            f"Choose `among` as a divisor of {width}, or 0 for no windows.",
        )
    whole = round(density * among)
    if among and (abs(density * among - whole) > 1e-6 or not whole):
        raise UserError(
            f"density {density} keeps {density * among:g} of every {among} inputs.",
            f"Choose a multiple of 1/{among}.",
        )


def keep_highest(scores: Float[Tensor, "sets size"], count: int) -> Bool[Tensor, "sets size"]:
    """True for the `count` highest scores of each row; of equal ones, the earlier."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order[:, :count], True)
