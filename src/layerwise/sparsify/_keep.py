"""How much is kept, and of what: exact counts, of equal scores the earlier."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core.errors import UserError


def count(density: float, size: int) -> int:
    """The nearest whole number to that fraction of `size`; one at least.

    Raises:
        UserError: The density is outside (0, 1].
    """
    if not 0 < density <= 1:
        raise UserError(f"density {density} is outside (0, 1].", "Give the fraction to keep.")
    return max(1, round(density * size))


def keep_highest(scores: Float[Tensor, "*sets size"], kept: int) -> Bool[Tensor, "*sets size"]:
    """True for the highest scores along the last axis."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :kept], True)
