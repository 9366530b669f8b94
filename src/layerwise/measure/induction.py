"""Induction: how far a block's attention finds what came before, and what followed it there."""

from collections.abc import Mapping, Sequence

from jaxtyping import Float, Float64
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import measure
from layerwise.measure._tokens import column


def _across(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The best of all blocks, and the best previous-token head in the blocks before that one."""
    found = column(records, "induction")
    place = max(range(len(found)), key=found.__getitem__)
    before = column(records[:place], "previous")
    return {
        "best": found[place],
        "place": float(place),
        "previous_before": max(before, default=0.0),
    }


@measure(
    Paper(
        "The mechanistic basis of data dependence and abrupt learning in an in-context "
        "classification task",
        2024,
        "2312.03002",
    ),
    unit="block",
    across=_across,
)
def induction(echoes: Float[Tensor, "windows heads length length"]) -> dict[str, float]:
    """Score a block by how much of an induction head it has.

    In-context learning begins abruptly, with a circuit of two heads in two layers; what its
    attention does grows before the accuracy jumps.  The paper's network reads items and labels
    (see layerwise.training.in_context for its own measures).  In a language model the windows are
    T tokens drawn at random, no two alike, and then the same T once more.  With A the attention,
    rows the tokens that look, and means over windows and over the tokens of the second half,

        induction  A[i, i - T + 1]  at what followed the token before: target to label
        same       A[i, i - T]      at the token itself: target to item
        previous   A[i, i - 1]      at the token before: label to item; over all but the first

    Each is that of the head which has the most.  A token that looks at all before it alike has
    less than 1 / T of each.  A head of `previous` in an earlier block is what one of `induction`
    builds on: across the model `best` is the largest `induction`, `place` its block from 0, and
    `previous_before` the largest `previous` of blocks before that.

    Unlike the paper, which has one head in a layer, the best of several is taken.

    Args:
        echoes: The block's attention on such windows; rows sum to 1.

    Returns:
        The record above, each from 0 to 1; its score is `induction`, higher is more.
    """
    maps = echoes.double()
    half = maps.shape[-1] // 2
    return {
        "induction": _best(maps.diagonal(offset=1 - half, dim1=2, dim2=3)[..., 1:]),
        "same": _best(maps.diagonal(offset=-half, dim1=2, dim2=3)),
        "previous": _best(maps.diagonal(offset=-1, dim1=2, dim2=3)),
    }


def _best(found: Float64[Tensor, "windows heads tokens"]) -> float:
    """The mean over windows and tokens of the head that has the most."""
    return float(found.mean(dim=(0, 2)).max())
