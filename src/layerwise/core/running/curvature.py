"""How the loss of a model curves along directions of a layer's weights."""

from collections.abc import Callable, Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerwise.core.errors import UserError
from layerwise.core.reading.structure import Layer
from layerwise.core.running.fisher import answered
from layerwise.core.running.runner import Runner

_PICTURES = 64  # at once
Product = Callable[[Float[Tensor, "out in"]], Float[Tensor, "out in"]]


class Curvature(Mapping[str, Product]):
    """The product of each layer's block of the Hessian of the loss with a direction.

    With g(W) the gradient of the mean loss by the layer's weight W (Pearlmutter 1994):

        H v = d/dW <g(W), v>

    The loss is that of `WeightGradients`.  The whole model is in memory, and the graph of one
    window (or of some pictures) with its second derivatives, from the layer on.

    Args:
        runner: Runs the model.
        layers: Its layers, by name.
        ids: Token ids, (windows, length), or whatever the model takes a batch of.
    """

    def __init__(self, runner: Runner, layers: Mapping[str, Layer], ids: Tensor) -> None:
        self.layers = layers
        self._runner = runner
        self._ids = ids
        self._answer = runner.differentiable("")
        text = ids.dim() == 2 and not ids.is_floating_point()
        self._at_once = 1 if text else _PICTURES

    def __getitem__(self, name: str) -> Product:
        layer = self.layers[name]
        weight = layer.read(self._runner.source).float().contiguous()

        def product(direction: Tensor) -> Tensor:
            total, predicted = torch.zeros(weight.shape, dtype=torch.float64), 0
            for windows in self._ids.split(self._at_once):
                turned, count = self._of(name, weight, direction, windows)
                total += turned.cpu()
                predicted += count
            return (total / max(predicted, 1)).float()

        return product

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def _of(
        self, name: str, weight: Tensor, direction: Tensor, windows: Tensor
    ) -> tuple[Tensor, int]:
        """The product for the loss of some windows, summed over predictions, and their number."""
        moving = weight.clone().requires_grad_()
        seen = False

        def linear(inputs: Tensor) -> Tensor:
            nonlocal seen
            seen = True
            return nn.functional.linear(inputs, moving.to(inputs.device))

        # Fused attention has no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            logits = self._answer(windows, {name: linear})
            scored, chosen = answered(self._runner, logits, windows)
            if not seen:
                if "expert" in name:
                    return torch.zeros_like(weight), len(chosen)
                raise UserError(
                    f"{name} was not seen to multiply anything, so how the loss curves along it is "
                    "not known.",
                    "Use a measure of weights, such as alpha.",
                )
            loss = nn.functional.cross_entropy(scored, chosen, reduction="sum")
            (slope,) = torch.autograd.grad(loss, moving, create_graph=True)
            (turned,) = torch.autograd.grad((slope * direction.to(slope.device)).sum(), moving)
        return turned, len(chosen)
