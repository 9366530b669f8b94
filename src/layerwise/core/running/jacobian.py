"""The derivative of what a block answers along a direction of what it is given."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerwise.core.running.carried import Activations
from layerwise.core.running.runner import Runner


def jacobian(
    runner: Runner, block: str, hidden: Activations
) -> Callable[[Float[Tensor, "tokens width"]], Float[Tensor, "tokens width"]]:
    """A function of a direction v to J v, at what a block is given of some windows.

    It is the forward derivative of the block, window by window (Pearlmutter 1994):

        J v = d/ds block(h + s v) at s = 0

    Args:
        runner: Runs the model, block by block.
        block: The block.
        hidden: What it is given, (windows, length, width).
    """

    def product(direction: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        answer = runner.block_answer(block, {})

        def answered(given: Tensor) -> Tensor:
            return answer(given, {})

        along = direction.reshape(hidden.shape)
        made: list[Tensor] = []
        size = runner.batch(hidden)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            given, towards = hidden[part].float(), along[part].float()
            # Fused attention has no forward derivative.
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                found: Any = torch.func.jvp(answered, (given,), (towards,))
            made.append(found[1].cpu())
        return torch.cat(made).reshape(direction.shape)

    return product
