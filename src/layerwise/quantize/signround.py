"""SignRound: learn which way each weight is rounded, and each grid's range, by signed gradients."""

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.learning import Schedule, learned_alone
from layerwise.core.results import Coded
from layerwise.core.statistics import check_statistics
from layerwise.core.verbs import quantizer
from layerwise.quantize._grid import by_group, check_grid, span
from layerwise.quantize._rounding import Rounded, check_schedule

# What is left of a range, at the least.
_LEAST_SHARE = 0.5


class SignRound(Rounded):
    """A layer whose rounding is being learned; the arguments are those of `signround`."""

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        gram: Float[Tensor, "in in"] | None = None,
        *,
        bits: int,
        group: int = 128,
        symmetric: bool = False,
        steps: int = 200,
        batch: int = 8,
    ) -> None:
        check_grid(weight, bits, group)
        check_schedule(steps, batch)
        grouped = by_group(weight, group)  # (out, groups, group)
        super().__init__(
            grouped,
            weight.shape[1],
            bits=bits,
            group=group,
            symmetric=symmetric,
            schedule=Schedule(steps, batch, "sign", "linear"),
        )
        self.rate = 1 / max(steps, 1)
        self.low = grouped.amin(dim=-1).clamp(max=0)
        self.high = grouped.amax(dim=-1).clamp(min=0)
        self.shift = torch.zeros_like(grouped).requires_grad_()
        self.shares = torch.ones(2, *self.low.shape).requires_grad_()

    def parameters(self) -> dict[float, list[Tensor]]:
        """The shift of each weight before it is rounded, and the share of each range."""
        return {self.rate: [self.shift, self.shares]}

    def settle(self) -> None:
        """Shifts stay within half a step, shares within half and all of a range."""
        with torch.no_grad():
            self.shift.clamp_(-0.5, 0.5)
            self.shares.clamp_(_LEAST_SHARE, 1.0)

    def grid(self) -> tuple[Tensor, Tensor]:
        """The grid over the shares of the range on both sides of 0.0."""
        low, high = self.low * self.shares[0], self.high * self.shares[1]
        return span(low, high, self.bits, self.symmetric)

    def steps(self, scale: Float[Tensor, "out groups"]) -> Float[Tensor, "out groups _"]:
        """Each weight in steps of its grid, and its shift."""
        return self.grouped / scale[..., None] + self.shift


@quantizer(
    Paper(
        "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs",
        2023,
        "2309.05516",
    ),
    claims=(
        Claim(
            "rtn",
            "stories-char-940k/quantize",
            {"group": 32, "symmetric": True, "bits": 4},
            0.5,
            "table 2: LLaMA-2-7B at 4 bits in groups of 128, above rounding and GPTQ",
        ),
    ),
    exempt={
        "each_bit_quarters_the_loss": "a weight goes up or down and no further, which "
        "cannot make up for what an input 30 times the others loses",
    },
    learns=SignRound,
    unit="block",
)
def signround(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    bits: int,
    group: int = 128,
    symmetric: bool = False,
    steps: int = 200,
    batch: int = 8,
) -> Coded:
    """Learn a shift of each weight before it is rounded, and how much of its range a grid spans.

        scale = (beta max(w, 0) - alpha min(w, 0)) / (2^bits - 1)
        code  = clamp(round(w / scale + v) + zero, 0, 2^bits - 1)            (eq. 2, 3)

    with v in [-1/2, 1/2] and alpha, beta in [1/2, 1], all of them moved against the sign of their
    gradient by a rate that falls from 1 / steps to 0 (algorithm 1).  What is minimized is the error
    of the block's answer, all of its layers learned together, where a model runs block by block;
    for one layer alone it is the error of its output.  Rounding passes gradients on as they come.
    The best parameters on windows that no step saw are kept.

    Args:
        weight: Layer to quantize.
        gram: Mean of x x^T over calibration tokens; of use where the layer is learned alone.
        bits: Width of a code, from 1 to 16.
        group: Inputs that share a grid.
        symmetric: Centre every grid on 0.0, so that no zero points are stored.
        steps: Updates; 0 is rounding to nearest.
        batch: Windows that each update sees.

    Raises:
        UserError: An option is out of range, or a value is NaN or infinite.
    """
    check_statistics(gram)
    layer = SignRound(weight, bits=bits, group=group, symmetric=symmetric, steps=steps, batch=batch)
    return learned_alone(layer, weight, gram)
