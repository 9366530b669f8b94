"""Rounding that is learned: what a weight is rounded as, and the steps of its grid."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.learning import Learned, Schedule, rounded
from layerwise.core.results import Quantized
from layerwise.quantize._grid import pack


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
