"""Curse of depth: how far several blocks together turn the residual stream."""

import math
from collections.abc import Mapping, Sequence

from jaxtyping import Float, Int64
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import measure
from layerwise.measure._tokens import column, cosine, mean


def _across(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The run of blocks that turns the stream least: where it begins, and how far it turns."""
    spans = column(records, "blocks")
    whole = [place for place, span in enumerate(spans) if span == spans[0]]
    place = min(whole, key=column(records, "angle").__getitem__)
    return {"start": float(place), "least": records[place]["angle"]}


@measure(
    Paper("The Curse of Depth in Large Language Models", 2025, "2502.05795"),
    unit="block",
    across=_across,
)
def angular_distance(
    later_states: Sequence[Float[Tensor, "shown width"]],
    positions: Int64[Tensor, " tokens"],
    *,
    blocks: int = 4,
) -> dict[str, float]:
    """Score a block by the angle by which it and the next ones turn the residual stream.

    With h_l what block l is given, and n blocks, as many as are left but at most `blocks`,

        angle = mean over tokens of arccos(cos(h_l, h_(l + n))) / pi
        end   = the same with h_L, what the last block answers
        blocks = n

    Runs of deep blocks that turn the stream little can be taken out together.  Of one block it is
    `depth_variance`'s.  The first token of each window is left out; a token without a direction
    counts as at right angles, where the official code counts an angle of 1/2 as well.

    Across the model, `start` is the place, from 0, where the run of n blocks begins that turns it
    least, and `least` its angle.

    Args:
        later_states: What the block is given, what it answers, and what each later block answers.
        positions: The place of each token in its window; of more tokens, the first count.
        blocks: How many, 1 or more.

    Returns:
        The record above; its score is `angle`, from 0 to 1, higher is more important.

    Raises:
        UserError: `blocks` is below 1.
    """
    if blocks < 1:
        raise UserError(f"the angle over {blocks} blocks is asked for.", "Give 1 or more.")
    span = min(blocks, len(later_states) - 1)
    later = positions[: len(later_states[0])] > 0
    first = later_states[0][later]
    return {
        "angle": _angle(first, later_states[span][later]),
        "end": _angle(first, later_states[-1][later]),
        "blocks": float(span),
    }


def _angle(one: Float[Tensor, "tokens width"], other: Float[Tensor, "tokens width"]) -> float:
    return mean(cosine(one, other).acos() / math.pi)
