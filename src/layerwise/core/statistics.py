"""What calibration saw, checked before a method builds on it."""

from jaxtyping import Float
from torch import Tensor

from layerwise.core.errors import UserError


def check_statistics(*statistics: Float[Tensor, "..."]) -> None:
    """Refuse statistics of calibration that no result can be trusted on.

    Raises:
        UserError: A value is NaN or infinite.
    """
    if not all(bool(values.isfinite().all()) for values in statistics):
        raise UserError(
            "the calibration statistics hold NaN or infinity.",
            "Calibrate in float32, on text the model reads without overflow.",
        )
