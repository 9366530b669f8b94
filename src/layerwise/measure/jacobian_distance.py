"""Curse of depth: how near a block is to doing nothing to a small change of its input."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import measure
from layerwise.measure._tokens import mean, share


@measure(
    Paper("The Curse of Depth in Large Language Models", 2025, "2502.05795"),
    unit="block",
    exempt={
        "ignores_the_order_of_tokens": "a direction is drawn for each token in its place, and the "
        "first tokens of windows are left out"
    },
)
def jacobian_distance(
    inputs: Float[Tensor, "tokens width"],
    jacobian: Callable[[Any], Any],
    positions: Int64[Tensor, " tokens"],
    *,
    draws: int = 1,
    seed: int = 0,
) -> float:
    """Score a block by how far its Jacobian is from the identity.

    Where a deep block adds little to a long residual stream, its derivative J tends to the
    identity: gradients pass by it, and it hardly learns.  With v random, of variance 1 in each
    entry of each token,

        distance = mean over tokens of ||(J v)_t - v_t|| / ||v_t||

    J v is the derivative of what the block answers to the text along v, tokens that attend to
    others included.  A window's first token does not count.  The paper has the limit in theory; to
    measure it like this is ours.

    Args:
        inputs: What the block is given.
        jacobian: A function of a direction, (tokens, width), to J times it.
        positions: The place of each token in its window.
        draws: Directions that are drawn; the mean is taken.
        seed: Of the directions.

    Returns:
        Distance, 0 or more: 0 of a block that does nothing; higher is more important.

    Raises:
        UserError: `draws` is below 1.
    """
    if draws < 1:
        raise UserError(f"{draws} directions are asked for.", "Give 1 or more.")
    generator = torch.Generator().manual_seed(seed)
    later = positions > 0
    found: list[float] = []
    for _ in range(draws):
        drawn = torch.randn(inputs.shape, generator=generator)
        found.append(mean(share((jacobian(drawn) - drawn)[later], drawn[later])))
    return sum(found) / draws
