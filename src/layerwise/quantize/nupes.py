"""NUPES: learn the exponent of a layer's powers, and codes that go anywhere on their grid."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.learning import Learned, Schedule, learned_alone, rounded
from layerwise.core.results import Coded, Quantized
from layerwise.core.statistics import check_statistics
from layerwise.core.verbs import quantizer
from layerwise.quantize._grid import by_group, check_grid
from layerwise.quantize._power import (
    best_exponent,
    check_exponents,
    power_pack,
    power_points,
    power_scale,
    power_steps,
)
from layerwise.quantize._rounding import check_schedule

# The exponent, of which there is one for all shifts of a layer, moves slower than they do.
_SLOWER = 10

_ROWS = {"group": 0, "symmetric": True}
_LEARNED = "abstract: exponents and codes that are learned against those found without data"
_ANYWHERE = "abstract: codes over the whole grid against rounding up or down"


class Nupes(Learned):
    """A layer whose exponent and shifts are being learned; the arguments are those of `nupes`."""

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        gram: Float[Tensor, "in in"] | None = None,
        *,
        bits: int,
        group: int = 0,
        symmetric: bool = True,
        steps: int = 200,
        batch: int = 8,
        rate: float = 1e-2,
        lowest: float = 0.2,
        highest: float = 1.2,
    ) -> None:
        self.width = weight.shape[1]
        self.bits, self.group, self.symmetric = bits, group or self.width, symmetric
        check_grid(weight, bits, self.group)
        check_exponents(bits, lowest, highest)
        check_schedule(steps, batch)
        if not 0 < rate < math.inf:
            raise UserError(f"rate is {rate}.", "Give a finite rate above 0, such as 0.01.")
        self.schedule = Schedule(steps, batch)
        self.rate = rate
        self.most = 2 ** (bits - 1) - 1
        self.grouped = by_group(weight, self.group)  # (out, groups, group)
        self.scale = power_scale(self.grouped)
        self.start = best_exponent(self.grouped, self.scale, bits, lowest, highest)
        self.range = (math.log(lowest / self.start), math.log(highest / self.start))
        # Logarithm of the exponent, less that of the first one.
        self.growth = torch.zeros((), dtype=torch.float64).requires_grad_()
        self.shift = torch.zeros_like(self.grouped).requires_grad_()

    @property
    def exponent(self) -> float:
        """The present one."""
        return self.start * math.exp(float(self.growth.detach()))

    def parameters(self) -> dict[float, list[Tensor]]:
        """The shift of each weight in codes, and the growth of the exponent."""
        return {self.rate: [self.shift], self.rate / _SLOWER: [self.growth]}

    def settle(self) -> None:
        """The exponent stays among those that are tried, and shifts lead no further than the ends.

        Past an end a weight has no gradient, and would never come back.
        """
        with torch.no_grad():
            self.growth.clamp_(*self.range)
            steps = power_steps(self.grouped, self.scale, self.bits, self.exponent)
            self.shift.clamp_(-self.most - steps, self.most - steps)

    def weight(self) -> Float[Tensor, "out in"]:
        """What the present codes stand for."""
        whole = self._whole()
        points = power_points(self.bits, self.exponent)
        codes = self._codes(whole)
        values = points[codes] + _slopes(points)[codes] * _only_gradient(whole)
        values = values + _turn(points)[codes] * _only_gradient(self.growth)
        return (values * self.scale[..., None]).flatten(1)[:, : self.width]

    def coded(self) -> Quantized:
        """The present codes, with a note of the exponent."""
        with torch.no_grad():
            codes = self._codes(self._whole())
        return power_pack(
            codes.flatten(1).float(),
            self.scale,
            width=self.width,
            bits=self.bits,
            group=self.group,
            symmetric=self.symmetric,
            exponent=self.exponent,
            notes=(f"exponent {self.exponent:.3g}",),
        )

    def _whole(self) -> Tensor:
        steps = power_steps(self.grouped, self.scale, self.bits, self.exponent)
        steps = steps - self.most * _turn(steps / self.most) * _only_gradient(self.growth)
        shifted = steps + self.shift * (self.grouped != 0)
        return rounded(shifted).clamp(-self.most, self.most)

    def _codes(self, whole: Tensor) -> Tensor:
        return whole.detach().long() + 2 ** (self.bits - 1)


@quantizer(
    Paper(
        "NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search",
        2023,
        "2308.05600",
    ),
    claims=(
        Claim("powerquant", "bytes-wikitext/quantize", _ROWS | {"bits": 3}, 0.0, _LEARNED),
        Claim("powerquant", "bytes-wikitext/quantize", _ROWS | {"bits": 4}, 0.0, _LEARNED),
        Claim("signround", "bytes-wikitext/quantize", _ROWS | {"bits": 3}, 0.0, _ANYWHERE),
        Claim("signround", "bytes-wikitext/quantize", _ROWS | {"bits": 4}, 0.0, _ANYWHERE),
    ),
    codes="points",
    widths=range(2, 9),
    learns=Nupes,
    unit="block",
)
def nupes(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    bits: int,
    group: int = 0,
    symmetric: bool = True,
    steps: int = 200,
    batch: int = 8,
    rate: float = 1e-2,
    lowest: float = 0.2,
    highest: float = 1.2,
) -> Coded:
    """Learn the exponent of a layer's powers, and a shift of each weight before it is rounded.

    Values that codes stand for are powers of whole numbers, as in PowerQuant (see there), from
    whose exponent learning starts:

        m = 2^(bits - 1) - 1,    s = max|w|
        q = clamp(round(sign(w) m (|w| / s)^a + v), -m, m),    Q(w) = s sign(q) (|q| / m)^(1 / a)

    The shifts v are in codes and lead as far as the ends, so that a weight may get any code there
    is, and another sign; one that was 0.0 stays 0.0.  The exponent a is learned as its logarithm,
    at a tenth of the rate, by which neither 0.0 nor the largest weight moves:

        d(u^a) / d(log a) = u^a log u^a,    d(u^(1 / a)) / d(log a) = -u^(1 / a) log u^(1 / a)

    Rounding passes gradients on as they come, clamping none past the ends.  What is minimized is
    the error of the block's answer, all of its layers learned together, where a model runs block
    by block; for one layer alone it is the error of its output.  Adam moves v and log a by rates
    that fall to 0 along a cosine.  The best parameters on windows that no step saw are kept.

    The gradient of Q by its code is the mean distance of the points beside it.  Unlike that of the
    power it is not 0 at 0.0 for a < 1, where most codes are and none would ever leave, and has a
    bound for a > 1.  At 2 bits steps are so wide that weights flip together, and learning may find
    nothing better than its start.  No code of the authors is public: rates and steps are ours.

    Args:
        weight: Layer to quantize.
        gram: Mean of x x^T over calibration tokens; of use where the layer is learned alone.
        bits: Width of a code, from 2 to 8.
        group: Inputs that share a scale; 0 is the whole row.
        symmetric: Store no zero points.  Powers lie alike on both sides of 0.0 either way.
        steps: Updates; 0 is PowerQuant.
        batch: Windows that each update sees.
        rate: Of the first update: of shifts in codes, of the exponent's logarithm ten times less.
        lowest: Least exponent, 0.1 or more.
        highest: Greatest one.

    Returns:
        Codes, with what each stands for.  A note says which exponent was learned.

    Raises:
        UserError: An option is out of range, or a value is NaN or infinite.
    """
    check_statistics(gram)
    layer = Nupes(
        weight,
        bits=bits,
        group=group,
        symmetric=symmetric,
        steps=steps,
        batch=batch,
        rate=rate,
        lowest=lowest,
        highest=highest,
    )
    return learned_alone(layer, weight, gram)


def _only_gradient(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Zeros, with the gradient of the values."""
    return values - values.detach()


def _turn(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """-v log |v|: how u^(1 / a) moves with log a; u^a moves the other way."""
    return values.sign() * torch.special.entr(values.abs())


def _slopes(points: Float[Tensor, " codes"]) -> Float[Tensor, " codes"]:
    """Half of the way from the point before each to the one after; the first is never used."""
    return functional.pad(torch.gradient(points[1:])[0], (1, 0))
