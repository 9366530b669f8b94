"""FlexRound: divide each weight by a factor of its own before it is rounded, and learn those."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.learning import Schedule, learned_alone
from layerwise.core.results import Coded
from layerwise.core.statistics import check_statistics
from layerwise.core.verbs import quantizer
from layerwise.quantize._grid import by_group, check_grid, fit, stored
from layerwise.quantize._rounding import Rounded, check_schedule


class FlexRound(Rounded):
    """A layer whose divisors are being learned; the arguments are those of `flexround`."""

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
        rate: float = 3e-3,
    ) -> None:
        check_grid(weight, bits, group)
        check_schedule(steps, batch)
        if not 0 < rate < math.inf:
            raise UserError(f"rate is {rate}.", "Give a finite rate above 0, such as 0.003.")
        grouped = by_group(weight, group)  # (out, groups, group)
        super().__init__(
            grouped,
            weight.shape[1],
            bits=bits,
            group=group,
            symmetric=symmetric,
            schedule=Schedule(steps, batch),
        )
        self.rate = rate
        self.scale, self.zero = fit(grouped, bits, symmetric)
        # Logarithms, of the size of a grid's step in its first one, of S2 and of s3.
        self.step = torch.zeros_like(self.scale).requires_grad_()
        self.divisor = torch.zeros_like(grouped).requires_grad_()
        self.row_divisor = grouped.new_zeros(len(grouped), 1, 1).requires_grad_()

    def parameters(self) -> dict[float, list[Tensor]]:
        """The step of each grid, and the divisors of each weight and of each row."""
        return {self.rate: [self.step, self.divisor, self.row_divisor]}

    def grid(self) -> tuple[Tensor, Tensor]:
        """The first grid with its present step; zero points stay."""
        return stored(self.scale * self.step.exp()), self.zero

    def steps(self, scale: Float[Tensor, "out groups"]) -> Float[Tensor, "out groups _"]:
        """Each weight, divided by its divisors, in steps of its grid."""
        return self.grouped / (scale[..., None] * (self.divisor + self.row_divisor).exp())


@quantizer(
    Paper(
        "FlexRound: Learnable Rounding based on Element-wise Division for Post-Training "
        "Quantization",
        2023,
        "2306.00317",
    ),
    claims=(
        Claim(
            "rtn",
            "bytes-wikitext/quantize",
            {"group": 0, "bits": 2},
            0.5,
            "LLaMA tables, a grid for each output channel: near the original where rounding is not",
        ),
        Claim(
            "signround",
            "bytes-wikitext/quantize",
            {"group": 0, "bits": 2},
            0.0,
            "abstract: division against rounding up or down, as AdaRound learns it",
        ),
        Claim(
            "signround",
            "bytes-wikitext/quantize",
            {"group": 0, "bits": 4},
            0.0,
            "abstract: division against rounding up or down, as AdaRound learns it",
        ),
    ),
    exempt={
        "each_bit_quarters_the_loss": "it starts from rounding to nearest and stays near it at 16 "
        "bits, which loses more through an input 30 times the others",
    },
    learns=FlexRound,
    unit="block",
)
def flexround(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    bits: int,
    group: int = 128,
    symmetric: bool = False,
    steps: int = 200,
    batch: int = 8,
    rate: float = 3e-3,
) -> Coded:
    """Learn a divisor of each weight, of each row, and the step of each grid.

        code = clamp(round(W / (s1 S2 s3)) + zero, 0, 2^bits - 1)
        Q(W) = s1 (code - zero)                                                  (eq. 2)

    with a step s1 for each grid, a divisor S2 for each weight and one s3 for each row, all above
    0 and learned as logarithms.  Rounding passes gradients on as they come, and clamping none past
    the ends, so that

        dL/d log S2 = -dL/dQ W / (S2 s3)

    A large weight can move by several steps while a small one hardly moves, and none changes its
    sign.  S2 and s3 are not stored.  What is minimized is the error of the block's answer, all of
    its layers learned together, where a model runs block by block; for one layer alone it is the
    error of its output.  Adam moves them by a rate that falls to 0 along a cosine.  The best
    parameters on windows that no step saw are kept.

    Steps start as those of rounding to nearest, and zero points stay what they were there.  Unlike
    the paper, which has one grid for a whole tensor, or for a row of a language model, grids are
    those of groups.  The paper takes 5,000 steps with 2 long windows each.

    Args:
        weight: Layer to quantize.
        gram: Mean of x x^T over calibration tokens; of use where the layer is learned alone.
        bits: Width of a code, from 1 to 16.
        group: Inputs that share a grid.
        symmetric: Centre every grid on 0.0, so that no zero points are stored.
        steps: Updates; 0 is rounding to nearest.
        batch: Windows that each update sees.
        rate: Of the first update, of logarithms.

    Raises:
        UserError: An option is out of range, or a value is NaN or infinite.
    """
    check_statistics(gram)
    layer = FlexRound(
        weight, bits=bits, group=group, symmetric=symmetric, steps=steps, batch=batch, rate=rate
    )
    return learned_alone(layer, weight, gram)
