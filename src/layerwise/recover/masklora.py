"""MaskLoRA: a low-rank change of a pruned weight, folded back inside its mask."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.learning import Learnable, Schedule
from layerwise.core.verbs import recoverer
from layerwise.recover._adapter import check_columns, schedule

_SOURCE = "card 158: perplexity at most 0.9 of the pruned model's, and near that of all weights"


@recoverer(
    Paper("PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023, "2312.15230"),
    claims=(
        Claim("none", "stories-char-940k/recover", {"density": 0.5}, 0.1, _SOURCE),
        Claim("none", "reference-6m/recover", {"density": 0.4}, 0.1, _SOURCE),
        Claim("vectors", "stories-char-940k/recover", {"density": 0.5}, 0.1, _SOURCE),
        Claim("full", "stories-char-940k/recover", {"density": 0.5}, -0.05, _SOURCE),
    ),
)
def masklora(
    weight: Float[Tensor, "out in"],
    kept: Bool[Tensor, "out in"],
    *,
    columns: int = 16,
    alpha: float = 32.0,
    steps: int = 200,
    rate: float = 2e-3,
    seed: int = 0,
) -> Learnable:
    """Learn a low-rank change of what stays of a pruned weight.

    With M the mask, r the number of columns, B (out, r) of zeros and A (r, in) drawn at random:

        W' = W + alpha / r * M o (B A)

    Only A and B are learned.  What was pruned stays zero, and the change is folded into the weight:
    nothing is added to the model.

    Unlike the paper, whose adapters are trained on the loss of the whole model for 1000 steps, they
    are learned block by block from what the block answered before it was pruned, which the paper
    calls reconstruction.  The rate is one for all sparsities.

    Args:
        weight: The pruned layer.
        kept: True where a weight stays.
        columns: Of B; the paper's rank r.
        alpha: Size of the change, against the columns.
        steps: Updates.
        rate: Of Adam, after a tenth of the steps; it falls to 0.
        seed: What is random in A.

    Raises:
        UserError: A number is out of range.
    """
    check_columns(columns, weight.shape[1])
    return _MaskLora(
        weight.float().where(kept, 0.0),
        kept,
        torch.zeros(len(weight), columns, requires_grad=True),
        _drawn(columns, weight.shape[1], seed).requires_grad_(),
        alpha / columns,
        rate,
        schedule(steps, rate),
    )


@dataclass(frozen=True)
class _MaskLora(Learnable):
    pruned: Float[Tensor, "out in"]
    kept: Bool[Tensor, "out in"]
    left: Float[Tensor, "out columns"]
    right: Float[Tensor, "columns in"]
    size: float
    rate: float
    schedule: Schedule

    def parameters(self) -> Mapping[float, Sequence[Tensor]]:
        return {self.rate: [self.left, self.right]}

    def weight(self) -> Float[Tensor, "out in"]:
        return self.pruned + (self.size * (self.left @ self.right)).where(self.kept, 0.0)


def _drawn(rows: int, width: int, seed: int) -> Float[Tensor, "rows width"]:
    """Uniform, with the spread that keeps the size of an input of that width."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(rows, width, generator=generator) - 1) * width**-0.5
