"""Trimmed mean: what is furthest out among the clients, entry by entry, does not count."""

import math

from jaxtyping import Float, Integer
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.errors import UserError
from layerwise.core.results import Aggregated
from layerwise.core.verbs import federator
from layerwise.federate._clients import participants, wide


@federator(
    Paper(
        "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
        2018,
        "1803.01498",
    )
)
def trimmed_mean(
    clients: Float[Tensor, "clients ..."],
    counts: Integer[Tensor, " _"],
    *,
    trimmed: float = 0.1,
) -> Aggregated:
    """Average each entry over the clients without its highest and lowest values (definition 2).

    Of K clients, ceil(trimmed K) are left out on either side, and one or two always stay: at
    trimmed 0.5 it is the median.  Clients count alike, whatever samples they have.

    The paper does not say how to round trimmed K: upwards, so that a tenth of fewer than ten
    clients is one and not none.

    Args:
        clients: One tensor as each client returned it.
        counts: Samples that each learned from; a client of none is left out.
        trimmed: Fraction of the clients that is left out on either side, from 0 to 0.5.

    Raises:
        UserError: Nobody takes part, what came does not fit or is no number, or the fraction is
            out of its range.
    """
    if not 0 <= trimmed <= 0.5:
        raise UserError(
            f"{trimmed} of the clients cannot be left out on either side.",
            "Give a fraction from 0 to 0.5.",
        )
    present, _ = participants(clients, counts)
    out = min(math.ceil(trimmed * len(present)), (len(present) - 1) // 2)
    middle = present.double().sort(dim=0).values[out : len(present) - out]
    return Aggregated(middle.mean(dim=0).to(wide(clients)))
