"""How what a model says depends on each of its layers' weights, window by window."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.reading.structure import Layer
from layerwise.core.running.carried import Shelf
from layerwise.core.running.fisher import seen_by_blocks
from layerwise.core.running.runner import Runner

# Directions of a window's last answer that are derived.
DIRECTIONS = 4
# Sides that a gradient is brought to where a layer's are longer.
_SIDE = 64


def tangents(
    runner: Runner, layers: Mapping[str, Layer], ids: Tensor, shelf: Shelf
) -> dict[str, Float[Tensor, "samples features"]]:
    """Gradients of a model's answers by each layer's weight, a row for each answer.

    An answer is a window's last logits along one of a few random directions r, the same for all
    models:

        J_(n, r) = d <r, logits_n> / dW

    Of layers with sides above 64 it is A J B with random A and B, of mean products as J has.  The
    products of rows are the layer's part of the neural tangent kernel.

    Args:
        runner: Runs the model.
        layers: Its layers, by name.
        ids: Token ids, (windows, length), or whatever the model takes a batch of.
        shelf: Where what each block sees is kept until the gradient comes back to it.

    Raises:
        UserError: A layer does not see every token of a window, as an expert does not.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    for place in range(DIRECTIONS):
        seen = seen_by_blocks(runner, ids, shelf)
        gradient = runner.gradient(seen.pop(), ids, _along(place))
        for block in reversed(runner.blocks):
            inside = [one for one in layers.values() if runner.whole or one.block == block]
            collectors = {layer.name: _Collector(layer) for layer in inside}
            gradient = runner.backward(block, seen.pop(), gradient, collectors)
            for name, collector in collectors.items():
                found[name].append(collector.rows(len(ids)))
    return {name: torch.cat(rows) for name, rows in found.items()}


def _along(place: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The sum over windows of the last logits along a direction."""

    def told(logits: Tensor, _: Tensor) -> Tensor:
        last = logits.reshape(len(logits), -1, logits.shape[-1])[:, -1]
        generator = torch.Generator().manual_seed(place)
        direction = torch.randn(last.shape[1], generator=generator) / last.shape[1] ** 0.5
        return (last @ direction.to(last)).sum()

    return told


class _Collector:
    """Keeps what a layer reads, and the gradient of what it answers, of all windows."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self._inputs: list[Tensor] = []
        self._slopes: list[Tensor] = []

    def listening(self, inputs: Callable[[], Tensor]) -> Callable[[Tensor], None]:
        """What takes in the gradient of the outputs of these inputs."""

        def see(gradient: Tensor) -> None:
            left, right = _sketches(self.layer)
            slopes = gradient.reshape(-1, gradient.shape[-1]).float()
            self._slopes.append(slopes.cpu() @ left)
            self._inputs.append(inputs().detach().float().cpu() @ right)

        return see

    def rows(self, windows: int) -> Float[Tensor, "windows features"]:
        """The gradient by the weight, for each window."""
        slopes, inputs = (
            torch.cat(parts) if parts else torch.zeros(0, 1)
            for parts in (self._slopes, self._inputs)
        )
        if not len(slopes) or len(slopes) % windows:
            raise UserError(
                f"{self.layer.name} does not see every token of a window, so its tangent kernel is "
                "not known.",
                "Use a measure of weights, such as displacement.",
            )
        first, second = (one.reshape(windows, -1, one.shape[1]) for one in (slopes, inputs))
        return (first.mT @ second).flatten(1)


def _sketches(layer: Layer) -> tuple[Tensor, Tensor]:
    """What brings outputs and inputs to few: the same for every model with such a layer."""
    generator = torch.Generator().manual_seed(0)
    made: list[Tensor] = []
    for side in (layer.rows, layer.width):
        drawn = torch.randn(side, _SIDE, generator=generator) / _SIDE**0.5
        made.append(drawn if side > _SIDE else torch.eye(side))
    return made[0], made[1]
