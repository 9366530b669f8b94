"""Channels in units: what both are scored by, and how many stay."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core.errors import UserError


def check_units(density: float, width: int, units: int) -> None:
    """Refuse a density that is none, and channels that are not so many equal runs.

    Raises:
        UserError: It says what is wrong.
    """
    if not 0 < density <= 1:
        raise UserError(f"density {density} is outside (0, 1].", "Give the fraction to keep.")
    if units < 1 or width % units:
        raise UserError(
            f"{width} channels are no {units} equal units.", f"Give a divisor of {width}."
        )


def by_unit(scores: Float[Tensor, " in"], units: int) -> Float[Tensor, " units"]:
    """The mean score of the channels of each unit."""
    return scores.reshape(units, -1).mean(dim=1)


def relative(scores: Float[Tensor, " in"]) -> Float[Tensor, " in"]:
    """Scores in units of their mean, so that layers compare; as they are if that is 0."""
    mean = scores.mean()
    return scores / mean if mean > 0 else scores


def keep_units(
    scores: Float[Tensor, " units"], density: float
) -> tuple[Bool[Tensor, " units"], tuple[str, ...]]:
    """True for the round(density * units) highest, of equal ones the earlier; one at least.

    The notes say where a density would have left none.
    """
    count = round(density * len(scores))
    order = scores.argsort(descending=True, stable=True)
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[order[: max(1, count)]] = True
    none = f"a density of {density:g} would leave no unit of {len(scores)}: one stays"
    return kept, () if count else (none,)
