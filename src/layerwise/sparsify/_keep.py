"""How much is kept, and of what: exact counts, of equal scores the earlier."""

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
    """True for the highest scores along the last axis; selected, not sorted, as models run."""
    size = scores.shape[-1]
    least = scores.kthvalue(size - kept + 1, dim=-1, keepdim=True).values
    above, equal = scores > least, scores == least
    places = kept - above.sum(dim=-1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=-1) <= places))
