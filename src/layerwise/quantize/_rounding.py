"""Rounding that is learned: what a weight is rounded as, and the steps of its grid."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.learning import Learned, Schedule, rounded
from layerwise.core.results import Quantized
from layerwise.quantize._grid import pack, storable

# What is left of a range, at the least.
LEAST_SHARE = 0.5


def check_schedule(steps: int, batch: int) -> None:
    """Refuse options by which nothing could be learned.

    Raises:
        UserError: `steps` is below 0, or `batch` below 1.
    """
    if steps < 0 or batch < 1:
        raise UserError(
            f"steps is {steps}, batch is {batch}.",
            "Give 0 or more steps, a batch of 1 or more.",
        )


def stored(scale: Float[Tensor, "out groups"]) -> Float[Tensor, "out groups"]:
    """Scales, as they are stored, with the gradient of the scales themselves."""
    return storable(scale.detach()) + (scale - scale.detach())


def spanned(
    low: Float[Tensor, "out groups"],
    high: Float[Tensor, "out groups"],
    bits: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor]:
    """The grid of `fit` between ends that are learned; `low` <= 0 <= `high`."""
    top = 2**bits - 1
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    wide = high / top - low / top
    scale = stored(wide)
    if symmetric:
        return scale, torch.full_like(low, 2 ** (bits - 1))
    return scale, rounded(-low / scale)


class Rounded(Learned):
    """A layer on even grids whose rounding is learned.

    Args:
        grouped: Weights by group, filled up with zeros.
        width: Inputs of the layer.
        bits: Width of a code.
        group: Inputs that share a grid.
        symmetric: No zero points are stored.
        schedule: How it is learned.
    """

    def __init__(
        self,
        grouped: Float[Tensor, "out groups _"],
        width: int,
        *,
        bits: int,
        group: int,
        symmetric: bool,
        schedule: Schedule,
    ) -> None:
        self.grouped, self.width = grouped, width
        self.bits, self.group, self.symmetric = bits, group, symmetric
        self.schedule = schedule

    @abstractmethod
    def grid(self) -> tuple[Tensor, Tensor]:
        """Scales, as they are stored, and zero points at the present parameters."""

    @abstractmethod
    def steps(self, scale: Float[Tensor, "out groups"]) -> Float[Tensor, "out groups _"]:
        """What is rounded to whole steps of the grid, at the present parameters."""

    def weight(self) -> Float[Tensor, "out in"]:
        """What the present codes stand for."""
        codes, scale, zero = self._parts()
        values = (codes - zero[..., None]) * scale[..., None]
        return values.flatten(1)[:, : self.width]

    def coded(self) -> Quantized:
        """The present codes."""
        with torch.no_grad():
            codes, scale, zero = self._parts()
        return pack(
            codes.flatten(1),
            scale,
            zero,
            width=self.width,
            bits=self.bits,
            group=self.group,
            symmetric=self.symmetric,
        )

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        scale, zero = self.grid()
        codes = (rounded(self.steps(scale)) + zero[..., None]).clamp(0, 2**self.bits - 1)
        return codes, scale, zero


class Shifted(Rounded):
    """A layer whose shifts and shares are moved against the sign of their gradient.

    Args:
        grouped: Weights by group, filled up with zeros.
        width: Inputs of the layer.
        shares: One of each grid's range for each of its ends that is learned, all 1 at first.
        bits: Width of a code.
        group: Inputs that share a grid.
        symmetric: No zero points are stored.
        steps: Updates.
        batch: Windows that each update sees.

    Raises:
        UserError: An option is out of range.
    """

    def __init__(
        self,
        grouped: Float[Tensor, "out groups _"],
        width: int,
        shares: Float[Tensor, "*ends out groups"],
        *,
        bits: int,
        group: int,
        symmetric: bool,
        steps: int,
        batch: int,
    ) -> None:
        check_schedule(steps, batch)
        super().__init__(
            grouped,
            width,
            bits=bits,
            group=group,
            symmetric=symmetric,
            schedule=Schedule(steps, batch, "sign", "linear"),
        )
        self.rate = 1 / max(steps, 1)
        self.shift = torch.zeros_like(grouped).requires_grad_()
        self.shares = shares.requires_grad_()

    def parameters(self) -> dict[float, list[Tensor]]:
        """The shift of each weight before it is rounded, and the share of each range."""
        return {self.rate: [self.shift, self.shares]}

    def settle(self) -> None:
        """Shifts stay within half a step, shares within LEAST_SHARE and 1."""
        with torch.no_grad():
            self.shift.clamp_(-0.5, 0.5)
            self.shares.clamp_(LEAST_SHARE, 1.0)

    def steps(self, scale: Float[Tensor, "out groups"]) -> Float[Tensor, "out groups _"]:
        """Each weight in steps of its grid, and its shift."""
        return self.grouped / scale[..., None] + self.shift
