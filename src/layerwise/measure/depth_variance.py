"""Curse of depth: the variance of the residual stream, and how little a block turns it."""

import math
from collections.abc import Mapping, Sequence

from jaxtyping import Float, Int64
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import measure
from layerwise.measure._tokens import column, cosine, later, mean, slope


def _across(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """How much the variance grows after the first block, and by how many nats in each."""
    after = [max(found, 1e-30) for found in column(records, "after")]
    return {"growth": after[-1] / after[0], "slope": slope([math.log(found) for found in after])}


@measure(
    Paper("The Curse of Depth in Large Language Models", 2025, "2502.05795"),
    unit="block",
    across=_across,
)
def depth_variance(
    inputs: Float[Tensor, "tokens width"],
    outputs: Float[Tensor, "tokens width"],
    positions: Int64[Tensor, " tokens"],
) -> dict[str, float]:
    """Score a block by the angle by which it turns the residual stream; tell its variance beside.

    In a transformer whose norms come before its sublayers, the variance of the stream grows with
    depth, so that what a deep block adds is small beside it and the block is close to doing
    nothing:

        angle      mean over tokens of arccos(cos(h, h')) / pi
        influence  1 - mean over tokens of cos(h, h')
        variance   over features and tokens of what the block is given, h
        after      over features and tokens of what it answers, h'
        median     over tokens of the variance over features of h
        with_first `variance`, with the first token of each window

    The first token of each window, on which attention rests, is left out but in the last one: it
    alone can be most of the variance.  A token without a direction counts as at right angles.

    Across the model, `growth` is `after` of the last block by that of the first, sigma_L^2 /
    sigma_1^2 in the paper, and `slope` the rise of its logarithm from block to block by least
    squares.  The angle over several blocks at once is not made: it is one of two streams that are
    never held together.

    Args:
        inputs: The residual stream before the block.
        outputs: The residual stream after it.
        positions: The place of each token in its window.

    Returns:
        The record above; its score is `angle`, from 0 to 1, higher is more important.
    """
    before, after = later(positions, inputs, outputs)
    turned = cosine(before, after)
    return {
        "angle": mean(turned.acos() / math.pi),
        "influence": 1 - mean(turned),
        "variance": _variance(before),
        "after": _variance(after),
        "median": float(before.double().var(dim=1, correction=0).median()) if len(before) else 0.0,
        "with_first": _variance(inputs),
    }


def _variance(tokens: Float[Tensor, "tokens width"]) -> float:
    return float(tokens.double().var(correction=0)) if tokens.numel() else 0.0
