"""All weights that stay, learned anew: what the others are measured against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.learning import Learnable, Schedule
from layerwise.core.verbs import recoverer
from layerwise.recover._adapter import schedule


@recoverer(
    Paper("Learning both Weights and Connections for Efficient Neural Networks", 2015, "1506.02626")
)
def full(
    weight: Float[Tensor, "out in"],
    kept: Bool[Tensor, "out in"],
    *,
    steps: int = 200,
    rate: float = 5e-4,
) -> Learnable:
    """Learn every weight that was not pruned.

        W' = M o V ,   V begins as W

    Unlike the paper, block by block, from what the block answered before it was pruned.

    Args:
        weight: The pruned layer.
        kept: True where a weight stays.
        steps: Updates.
        rate: Of Adam, after a tenth of the steps; it falls to 0.

    Raises:
        UserError: A number is out of range.
    """
    value = weight.float().where(kept, 0.0).clone().requires_grad_()
    return _Full(value, kept, rate, schedule(steps, rate))


@dataclass(frozen=True)
class _Full(Learnable):
    value: Float[Tensor, "out in"]
    kept: Bool[Tensor, "out in"]
    rate: float
    schedule: Schedule

    def parameters(self) -> Mapping[float, Sequence[Tensor]]:
        return {self.rate: [self.value]}

    def weight(self) -> Float[Tensor, "out in"]:
        return self.value.where(self.kept, 0.0)
