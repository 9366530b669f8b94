"""ScaleLoRA: a pruned weight times a low-rank matrix that begins as ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.learning import Learnable, Schedule
from layerwise.core.verbs import recoverer
from layerwise.recover._adapter import check_columns, schedule

_SOURCE = "card 158: it keeps the mask by itself; ours: it recovers something"


@recoverer(
    Paper("PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023, "2312.15230"),
    claims=(Claim("vectors", "stories-char-940k/recover", {"density": 0.5}, 0.02, _SOURCE),),
)
def scalelora(
    weight: Float[Tensor, "out in"],
    kept: Bool[Tensor, "out in"],
    *,
    columns: int = 16,
    steps: int = 200,
    rate: float = 5e-4,
) -> Learnable:
    """Learn factors for what stays of a pruned weight, as the product of two thin matrices.

    With r columns, B (out, r) and A (r, in) both begin as 1 / sqrt(r) everywhere, so that B A is
    all ones:

        W' = W o (B A)

    Zeros stay zeros whatever the factors are.  The paper does not say how columns that begin alike
    are to become different: they do not, so each is moved by a little that its two factors undo,
    1 / sqrt(r) (1 + e) and 1 / sqrt(r) / (1 + e), with e from -0.1 to 0.1.

    Args:
        weight: The pruned layer.
        kept: True where a weight stays.
        columns: Of B; the paper's rank r.
        steps: Updates.
        rate: Of Adam, after a tenth of the steps; it falls to 0.

    Raises:
        UserError: A number is out of range.
    """
    check_columns(columns, weight.shape[1])
    spread = 1 + torch.linspace(-0.1, 0.1, columns) if columns > 1 else torch.ones(1)
    begun = columns**-0.5
    left = (begun * spread).expand(len(weight), -1).clone()
    right = (begun / spread)[:, None].expand(-1, weight.shape[1]).clone()
    return _ScaleLora(
        weight.float().where(kept, 0.0),
        left.requires_grad_(),
        right.requires_grad_(),
        left.detach() @ right.detach(),
        rate,
        schedule(steps, rate),
    )


@dataclass(frozen=True)
class _ScaleLora(Learnable):
    pruned: Float[Tensor, "out in"]
    left: Float[Tensor, "out columns"]
    right: Float[Tensor, "columns in"]
    begun: Float[Tensor, "out in"]
    rate: float
    schedule: Schedule

    def parameters(self) -> Mapping[float, Sequence[Tensor]]:
        return {self.rate: [self.left, self.right]}

    def weight(self) -> Float[Tensor, "out in"]:
        # What the product is at first counts as exactly 1, whatever its sums were rounded to.
        return self.pruned + self.pruned * (self.left @ self.right - self.begun)
