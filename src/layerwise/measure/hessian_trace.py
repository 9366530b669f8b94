"""Hessian trace: the curvature of the loss over all of a layer's weights."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import measure


@measure(Paper("A Model Zoo on Phase Transitions in Neural Networks", 2025, "2504.18072"))
def hessian_trace(
    weight: Float[Tensor, "out in"],
    hessian: Callable[[Any], Any],
    *,
    draws: int = 10,
    mean: bool = False,
    seed: int = 0,
) -> float:
    """Score a layer by the trace of the loss's Hessian by its weights.

    Hutchinson's estimate, from directions v of random signs, whose mean is the trace:

        trace H = E v^T H v

    Its standard error after n draws is the root of 2 sum_{i != j} H_ij^2 / n.

    Unlike the official code, which stops once the running mean moves by little relative to itself
    plus 1e-6 (a mean below zero stops it at once), it takes as many draws as were asked for.  The
    zoo takes the Hessian by all weights of a network, of which this is one layer's part: the
    traces of all layers add up.

    Args:
        weight: The layer.
        hessian: The product of the Hessian with a direction, both (out, in).
        draws: Random directions.
        mean: Divide by the number of weights: the mean eigenvalue.
        seed: Of the directions.

    Returns:
        Trace, in nats per squared unit of weight; higher is more important.

    Raises:
        UserError: `draws` is below 1.
    """
    if draws < 1:
        raise UserError(f"{draws} directions are asked for.", "Give 1 or more.")
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(draws):
        signs = torch.randint(0, 2, weight.shape, generator=generator).float() * 2 - 1
        total += float((signs * hessian(signs)).sum(dtype=torch.float64))
    return total / draws / (weight.numel() if mean else 1)
