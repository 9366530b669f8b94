"""Depth efficiency: how much a block adds to the residual stream, and in what direction."""

from collections.abc import Mapping, Sequence

from jaxtyping import Float, Int64
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import measure
from layerwise.measure._tokens import centre, column, cosine, later, mean, share


def _across(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Where the contributions lie: the mean of the block's place, weighed by its share."""
    return {"centre": centre(column(records, "share"))}


@measure(
    Paper("Do Language Models Use Their Depth Efficiently?", 2025, "2505.13898"),
    unit="block",
    across=_across,
)
def depth_contribution(
    inputs: Float[Tensor, "tokens width"],
    updates: Sequence[Float[Tensor, "tokens width"]],
    positions: Int64[Tensor, " tokens"],
) -> dict[str, float]:
    """Score a block by the length of what it adds to the residual stream, as a share of that.

    A block of a transformer gives back what it was given and what it adds:

        h' = h + u_1 + u_2 ,    u_1 of the attention, u_2 of the MLP

    Late blocks of large models add little to a long stream.  Means over tokens of

        share    ||u_1 + u_2|| / ||h||        cosine    cos(u_1 + u_2, h)
        share_1  ||u_1|| / ||h||              cosine_1  cos(u_1, h)
        share_2  ||u_2|| / ||h + u_1||        cosine_2  cos(u_2, h + u_1)
        stays    cos(h', h)                   norm      ||h||

    A cosine below 0 erases, near 0 writes in new directions, above 0 amplifies.  Where attention
    and MLP are added at once there is one u; where more is added, more, each beside the stream as
    it is then.  What is added is what is found to be added while the block runs, so that a norm
    behind a sublayer counts.

    As in the authors' code, a window's first token does not count: attention makes it many times
    as long as the others.  A stream shorter than 1e-6 counts as that long.  The first block's
    share is large where embeddings are short.

    Across the model, `centre` is the depth score of the paper: the mean of the block's place from
    0, weighed by `share`.

    Args:
        inputs: The residual stream before the block.
        updates: What the block adds to it, addition by addition.
        positions: The place of each token in its window.

    Returns:
        The record above; its score is `share`, higher is more.
    """
    stream, *added = later(positions, inputs, *updates)
    before, total = stream, sum(added)
    assert isinstance(total, Tensor), "a block adds something"
    record = {
        "share": mean(share(total, before)),
        "cosine": mean(cosine(total, before)),
        "stays": mean(cosine(before + total, before)),
        "norm": mean(before.double().norm(dim=1)),
    }
    for place, update in enumerate(added, 1):
        record[f"share_{place}"] = mean(share(update, stream))
        record[f"cosine_{place}"] = mean(cosine(update, stream))
        stream = stream + update
    return record
