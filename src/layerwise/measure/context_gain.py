"""Context gain: how much of what a model learns from the beginning of a text hangs on a block."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import measure
from layerwise.measure._tokens import Answers


def _across(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What the model as it is gains: the same for all blocks."""
    return {"gain": records[0]["lost"] + records[0]["gain"]}


@measure(
    Paper(
        "The mechanistic basis of data dependence and abrupt learning in an in-context "
        "classification task",
        2024,
        "2312.03002",
    ),
    unit="block",
    across=_across,
    exempt={
        "a_block_that_does_nothing_scores_least": "a model may learn more from a text without a "
        "block that foretells its beginning: then the score is below 0"
    },
)
def context_gain(
    answers: Answers,
    removed: Answers,
    ids: Int64[Tensor, "windows length"],
    *,
    share: float = 0.25,
) -> dict[str, float]:
    """Score a block by how much less a model learns from the beginning of a text without it.

    What is told of in-context learning in language models is how much better later tokens are
    foretold than early ones.  With the mean cross-entropy of the next token over the first quarter
    of each window and over the last,

        gain   = loss of the first quarter - loss of the last
        lost   = gain of the model - gain of the model without the block

    `lost` is most where the circuit is: induction heads, which `induction` finds by what they look
    at, and what they build on.  It says nothing of a model that does not gain, and less of blocks
    without which all is lost: then nothing is gained, whatever the block did.

    Unlike the usual loss at the 50th token less that at the 500th (Olsson et al. 2022,
    arXiv:2209.11895), which is a mean over many windows of a single place, it is a mean over
    places of few windows, of whatever length these are.

    Across the model, `gain` is that of the model as it is.  For B blocks it takes B^2 / 2 passes of
    16 windows through a block.

    Args:
        answers: Log-probabilities of what the model answers.
        removed: Of what it answers without the block.
        ids: The tokens that both foretell.
        share: How much of a window is its beginning, and how much its end; at most half.

    Returns:
        `lost`, the score, which may be below 0, higher is more important; and `gain`, that of the
        model without the block.  In nats per token.

    Raises:
        UserError: The share is not above 0 and at most half.
    """
    if not 0 < share <= 0.5:
        raise UserError(
            f"a beginning of {share} of a window is asked for.", "Give above 0 and at most 0.5."
        )
    whole, left = (_gain(part, ids, share) for part in (answers, removed))
    return {"lost": whole - left, "gain": left}


def _gain(answers: Answers, ids: Int64[Tensor, "windows length"], share: float) -> float:
    """By how much the end of windows is better foretold than their beginning."""
    losses = torch.cat(list(_losses(answers, ids)))  # (windows, length - 1)
    count = max(1, round(share * losses.shape[1]))
    return float(losses[:, :count].mean() - losses[:, -count:].mean())


def _losses(
    answers: Answers, ids: Int64[Tensor, "windows length"]
) -> Iterator[Float64[Tensor, "_ predicted"]]:
    """What each next token costs, batch after batch."""
    start = 0
    for part in answers:
        shown = ids[start : start + len(part)]
        yield -part[:, :-1].gather(2, shown[:, 1:, None])[..., 0].double()
        start += len(part)
