"""Rounding that is learned: a shift of each weight before it is rounded, a share of each grid."""

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
    scale = storable(wide.detach()) + (wide - wide.detach())
    if symmetric:
        return scale, torch.full_like(low, 2 ** (bits - 1))
    return scale, rounded(-low / scale)


class OnGrid(Learned):
    """A layer whose weights are the points of grids, both of them learned."""

    width: int
    bits: int
    group: int
    symmetric: bool

    @abstractmethod
    def grid(self) -> tuple[Tensor, Tensor]:
        """Scales, as they are stored, and zero points at the present parameters."""

    @abstractmethod
    def steps(self, scale: Float[Tensor, "out groups"]) -> Float[Tensor, "out groups _"]:
        """Weights before they are rounded, in steps of their grids."""

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


class Shifted(OnGrid):
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
        if steps < 0 or batch < 1:
            raise UserError(
                f"steps is {steps}, batch is {batch}.",
                "Give 0 or more steps, a batch of 1 or more.",
            )
        self.grouped, self.width = grouped, width
        self.bits, self.group, self.symmetric = bits, group, symmetric
        self.schedule = Schedule(steps, batch, "sign", "linear")
        self.rate = 1 / max(steps, 1)
        self.shift = torch.zeros_like(grouped).requires_grad_()
        self.shares = shares.requires_grad_()

    def steps(self, scale: Float[Tensor, "out groups"]) -> Float[Tensor, "out groups _"]:
        """Weights in steps of their grids, each with its shift."""
        return self.grouped / scale[..., None] + self.shift

    def parameters(self) -> dict[float, list[Tensor]]:
        """The shift of each weight before it is rounded, and the share of each range."""
        return {self.rate: [self.shift, self.shares]}

    def settle(self) -> None:
        """Shifts stay within half a step, shares within LEAST_SHARE and 1."""
        with torch.no_grad():
            self.shift.clamp_(-0.5, 0.5)
            self.shares.clamp_(LEAST_SHARE, 1.0)
