"""What adapters have in common: how they are learned, and what they begin with."""

from layerwise.core.errors import UserError
from layerwise.core.learning import Schedule


def schedule(steps: int, rate: float) -> Schedule:
    """Adam with a tenth of the steps to warm up, then a linear fall.

    Raises:
        UserError: A number is out of range.
    """
    if steps < 0 or not 0 < rate < float("inf"):
        raise UserError(
            f"steps is {steps}, rate is {rate}.", "Give 0 steps or more, and a rate above 0."
        )
    return Schedule(steps, decay="linear", warmup=0.1)


def check_columns(columns: int, width: int) -> None:
    """Refuse factors without a column.

    Raises:
        UserError: There are none.
    """
    if columns < 1:
        raise UserError(f"columns is {columns}.", f"Give 1 or more; {width} is the full rank.")
