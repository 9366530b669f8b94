"""Only what stands beside the weights is learned: gains of norms, and biases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.learning import Learnable, Schedule
from layerwise.core.verbs import recoverer
from layerwise.recover._adapter import schedule

_SOURCE = "abstract: a fraction of a per cent of the parameters recovers most of what was lost"


@recoverer(
    Paper("PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023, "2312.15230"),
    claims=(
        Claim("none", "stories-char-940k/recover", {"density": 0.5}, 0.1, _SOURCE),
        Claim("none", "reference-6m/recover", {"density": 0.4}, 0.1, _SOURCE),
    ),
    exempt={"comes_closer_to_a_weight": "the weight stays: what stands beside it is learned"},
)
def vectors(
    weight: Float[Tensor, "out in"],
    kept: Bool[Tensor, "out in"],
    *,
    steps: int = 200,
    rate: float = 5e-3,
) -> Learnable:
    """Leave a pruned weight as it is, while the gains and biases of its block are learned.

        W' = W

    A model without biases has its norms' gains only.

    Args:
        weight: The pruned layer.
        kept: True where a weight stays.
        steps: Updates.
        rate: Of Adam, after a tenth of the steps; it falls to 0.

    Raises:
        UserError: A number is out of range.
    """
    return _Still(weight.float().where(kept, 0.0), schedule(steps, rate))


@dataclass(frozen=True)
class _Still(Learnable):
    pruned: Float[Tensor, "out in"]
    schedule: Schedule

    def parameters(self) -> Mapping[float, Sequence[Tensor]]:
        return {}

    def weight(self) -> Float[Tensor, "out in"]:
        return self.pruned
