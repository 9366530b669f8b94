"""How much a model's loss moves when a layer's weights do, by passes forward alone."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from layerwise.core.reading.structure import Layer
from layerwise.core.running.carried import Activations
from layerwise.core.running.fisher import GRADIENT_WINDOWS, answered
from layerwise.core.running.runner import Runner

# How far weights move, in units of the noise; small beside weights, large beside what rounding the
# losses of a window does.
STEP = 1e-3


class WeightSlopes:
    """Slopes of the loss of a model as it is along random directions, a layer at a time.

    Each window of the calibration text has a direction of its own, z of independent normal
    numbers, and the loss is that of the window:

        slope = (L(W + eps z) - L(W - eps z)) / (2 eps)

    Nothing is derived: what is held is what a pass forward holds.  Weights are not moved in place.

    Args:
        runner: Runs the model.
        ids: Token ids, (windows, length), or whatever the model takes a batch of; the first few
            are used.
    """

    def __init__(self, runner: Runner, ids: Tensor) -> None:
        self.runner = runner
        self.ids = ids[:GRADIENT_WINDOWS]

    def of(
        self, block: str, layers: Sequence[Layer], hidden: Activations
    ) -> dict[str, Float[Tensor, " windows"]]:
        """Slopes for some layers of a block, by name.

        Args:
            block: The block, or "" for a model that runs as a whole.
            layers: Layers in it.
            hidden: What the block sees of the windows; more may follow.
        """
        return {layer.name: self._along(block, layer, hidden) for layer in layers}

    def _along(self, block: str, layer: Layer, hidden: Activations) -> Float[Tensor, " windows"]:
        tensor = self.runner.source.read(layer.tensor).float()
        generator = torch.Generator().manual_seed(0)
        sides: list[list[Tensor]] = [[], []]
        for window in range(len(self.ids)):
            noise = torch.randn(layer.rows, layer.width, generator=generator)
            for side, step in zip(sides, (STEP, -STEP), strict=True):
                moved = tensor.clone()
                layer.matrix(moved).add_(noise, alpha=step)
                given = hidden[window : window + 1]
                side.append(self.runner.forward(block, given, {layer.tensor: moved}))
        ends = torch.cat([torch.cat(side) for side in sides])  # (2 * windows, ...)
        blocks = self.runner.blocks
        for later in blocks[blocks.index(block) + 1 :]:
            ends = self.runner.forward(later, ends, {})
        up, down = self._losses(ends).chunk(2)
        return ((up - down) / (2 * STEP)).float()

    def _losses(self, ends: Tensor) -> Float[Tensor, " windows"]:
        """The mean loss of each window, in nats, float64."""
        ids = torch.cat([self.ids, self.ids])
        losses: list[Tensor] = []
        start = 0
        for logits in self.runner.logits(ends, ids, {}):
            for one in logits.split(1):
                scored, chosen = answered(self.runner, one, ids[start : start + 1])
                losses.append(functional.cross_entropy(scored.double(), chosen))
                start += 1
        return torch.stack(losses)
