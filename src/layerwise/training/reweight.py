"""A head to train behind a representation and take away afterwards."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layerwise.core.errors import UserError

# Below this a feature would no longer be learned from.
_LEAST = 1e-6


class Reweight(nn.Module):
    """Weighs the features of a representation down one after the other; nothing of it learns.

    Xue et al., "Investigating the Benefits of Projection Head for Representation Learning", 2024
    (arXiv:2403.11391): training makes deep layers weigh features ever more unequally, so that what
    stands before a projection head knows more than what stands behind it.  A fixed head does what a
    learned one does:

        H(x)_i = x_i kappa^-i ,    i = 0 ... width - 1

    A loss is put on H(R), and R is what is used then: its features have been kept more even, as
    `measure/feature_weighting` shows.  Which feature comes first means nothing before training: the
    network learns to put first what matters most to the loss.

        network = nn.Sequential(body, Reweight(512, kappa=1.02), nn.Linear(512, classes))

    Where kappa^-i is below 1e-6 it is 1e-6, which the paper does not say.

    Args:
        width: Features.
        kappa: How unequal they become: 1 or more; at 1 the head does nothing.

    Raises:
        UserError: kappa is below 1, or there are no features.
    """

    weights: Tensor

    def __init__(self, width: int, kappa: float = 1.02) -> None:
        super().__init__()
        if kappa < 1 or width < 1:
            raise UserError(
                f"a head of {width} features and kappa {kappa} is asked for.",
                "Give one feature or more, and kappa of 1 or more.",
            )
        powers = torch.arange(width, dtype=torch.float64)
        weights = (float(kappa) ** -powers).clamp(min=_LEAST).float()
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, features: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        """The features, weighed."""
        return features * self.weights
