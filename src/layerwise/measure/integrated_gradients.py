"""Depth efficiency: which tokens of a block's input the model's answer hangs on."""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import measure
from layerwise.measure._tokens import centre, column, mean


def _across(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Where the model still takes from earlier tokens: the mean place, weighed by `earlier`."""
    return {"centre": centre(column(records, "earlier"))}


@measure(
    Paper("Do Language Models Use Their Depth Efficiently?", 2025, "2505.13898"),
    unit="block",
    across=_across,
)
def integrated_gradients(attributions: Float[Tensor, "windows length"]) -> dict[str, float]:
    """Score a block by how much of the answer still hangs on what it is given of earlier tokens.

    With p the probability that the model gives a window's last token, and h what the block is
    given of that window, h_0 its mean over the window's tokens (Sundararajan et al. 2017,
    arXiv:1703.01365),

        a_t = sum over features of (h - h_0) . integral from 0 to 1 of dp/dh (h_0 + s (h - h_0)) ds

    The integral is a sum at the midpoints of 32 steps.  All a_t add up to p less what it is at h_0.

        earlier  mean over windows of sum of |a_t| at t before the last that is read, by that of all
        moved    mean over windows of |sum of a_t|

    As soon as the model is done with taking from other tokens, `earlier` is near 0: later blocks
    only work on the last one.

    Unlike the paper, which takes the answers of prompts and 256 steps, it is one token a window,
    of four windows of the text; `earlier` is ours, for the paper shows all a_t.

    Across the model, `centre` is the mean of the block's place from 0, weighed by `earlier`.

    Args:
        attributions: a_t of the tokens of each window but the last, which nothing answers.

    Returns:
        The record above; its score is `earlier`, from 0 to 1, higher is more important.
    """
    sizes = attributions.double().abs()
    whole = sizes.sum(dim=1)
    shares = sizes[:, :-1].sum(dim=1) / whole.where(whole > 0, 1.0)
    return {"earlier": mean(shares), "moved": mean(attributions.double().sum(dim=1).abs())}
