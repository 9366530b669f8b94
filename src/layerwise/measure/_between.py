"""What lies between a tensor and another of its shape."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def direction(weight: Float[Tensor, "..."]) -> Float64[Tensor, "..."]:
    """A tensor at length 1, or of zeros where it has none."""
    wide = weight.double()
    # Brought to a largest entry of 1 first: the square of a tiny one would vanish.
    level = wide / wide.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return level / level.norm().clamp(min=torch.finfo(torch.float64).tiny)
