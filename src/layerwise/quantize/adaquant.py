"""AdaQuant: move every weight, and its grid's range, to lose least of the layer's output."""

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.learning import Schedule, learned_alone
from layerwise.core.results import Coded
from layerwise.core.statistics import check_statistics
from layerwise.core.verbs import quantizer
from layerwise.quantize._grid import by_group, check_grid, span
from layerwise.quantize._rounding import Rounded, check_schedule

# The least share of its range that a grid spans.
_LEAST = 1e-3


class AdaQuant(Rounded):
    """A layer whose weights move freely; the arguments are those of `adaquant`."""

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        gram: Float[Tensor, "in in"] | None = None,
        *,
        bits: int,
        group: int = 128,
        symmetric: bool = False,
        steps: int = 200,
        rate: float = 0.01,
        range_rate: float = 0.005,
    ) -> None:
        check_grid(weight, bits, group)
        schedule = Schedule(steps)
        check_schedule(schedule.steps, schedule.batch)
        if not (rate > 0 and range_rate > 0):
            raise UserError(f"rate is {rate}, range_rate is {range_rate}.", "Give rates above 0.")
        super().__init__(
            by_group(weight, group),  # (out, groups, group)
            weight.shape[1],
            bits=bits,
            group=group,
            symmetric=symmetric,
            schedule=schedule,
        )
        self.rate, self.range_rate = rate, range_rate
        self.low = self.grouped.amin(dim=-1).clamp(max=0)
        self.high = self.grouped.amax(dim=-1).clamp(min=0)
        self.spread = weight.float().std(dim=1, correction=0)[:, None, None]
        self.moves = torch.zeros_like(self.grouped).requires_grad_()
        self.shares = torch.ones(2, *self.low.shape).requires_grad_()

    def parameters(self) -> dict[float, list[Tensor]]:
        """The move of each weight in deviations of its row, and the share of each range."""
        if self.rate == self.range_rate:
            return {self.rate: [self.moves, self.shares]}
        return {self.rate: [self.moves], self.range_rate: [self.shares]}

    def settle(self) -> None:
        """A range never turns round."""
        with torch.no_grad():
            self.shares.clamp_(min=_LEAST)

    def grid(self) -> tuple[Tensor, Tensor]:
        """The grid over the shares of the range on both sides of 0.0."""
        low, high = self.low * self.shares[0], self.high * self.shares[1]
        return span(low, high, self.bits, self.symmetric)

    def steps(self, scale: Float[Tensor, "out groups"]) -> Float[Tensor, "out groups _"]:
        """Weights as they are by now, in steps of their grids."""
        return (self.grouped + self.spread * self.moves) / scale[..., None]


@quantizer(
    Paper(
        "Improving Post Training Neural Quantization: Layer-wise Calibration and Integer "
        "Programming",
        2020,
        "2006.10518",
    ),
    claims=(
        Claim(
            "rtn",
            "stories-char-940k/quantize",
            {"group": 32, "symmetric": True, "bits": 3},
            0.4,
            "abstract: ResNet-50 in 4 bits within 1%; 0.6 of the loss of rounding is ours",
        ),
    ),
    exempt={
        "each_bit_quarters_the_loss": "the few steps of a law do not make up for what an input 30 "
        "times the others loses"
    },
    learns=AdaQuant,
)
def adaquant(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    bits: int,
    group: int = 128,
    symmetric: bool = False,
    steps: int = 200,
    rate: float = 0.01,
    range_rate: float = 0.005,
) -> Coded:
    """Move every weight freely, and its grid's range, so that the layer answers as before.

        min  E |W x - Q(V) x|^2 = tr((W - Q(V)) G (W - Q(V))^T)
        V, R

        scale = R / (2^bits - 1)        Q(v) = scale (clamp(round(v / scale) + zero) - zero)

    over V, which starts as W, and the ranges R of all grids, by Adam; rounding passes gradients on
    as they come.  Unlike AdaRound's, a weight may end at any point of its grid.  The best that was
    seen on the way is kept.

    The widths of layers that the paper then finds by an integer program are what `--budget` with
    `--sensitivity kl` finds: allocate/knapsack is exact for the same sum (tests/allocate holds it
    against every plan there is).  Its re-estimated batch norms and its tuned biases are
    `--tune norms,bias`, for this method and every other.

    Unlike the paper, the error is over all tokens at every step, known from G, and the layer's
    inputs are what it sees behind earlier blocks that are quantized: its sequential variant, with
    the layer's own answer to them as the target.  Where a model runs as a whole they are those of
    the original: the parallel one.  Rates are in deviations of the row and in shares of the range,
    for 1e-5 suits nets of one size only, and fall along a cosine.  The bias and the ranges of
    inputs are not learned here.

    Args:
        weight: Layer to quantize.
        gram: Mean of x x^T over calibration tokens.
        bits: Width of a code, from 1 to 16.
        group: Inputs that share a grid.
        symmetric: Centre every grid on 0.0, so that no zero points are stored.
        steps: Updates; 0 is rounding to nearest.
        rate: How far an update moves a weight, in standard deviations of its row.
        range_rate: How far it moves an end of a range, as a share of it.

    Raises:
        UserError: An option is out of range, or a value is NaN or infinite.
    """
    check_statistics(gram)
    layer = AdaQuant(
        weight,
        bits=bits,
        group=group,
        symmetric=symmetric,
        steps=steps,
        rate=rate,
        range_rate=range_rate,
    )
    return learned_alone(layer, weight, gram)
