"""Federated averaging: each client counts as much as it has samples."""

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.results import Aggregated
from layerwise.core.verbs import federator
from layerwise.federate._clients import combined, participants


@federator(
    Paper(
        "Communication-Efficient Learning of Deep Networks from Decentralized Data",
        2017,
        "1602.05629",
    )
)
def fedavg(
    clients: Float[Tensor, "clients ..."],
    counts: Integer[Tensor, " _"],
    *,
    uniform: bool = False,
) -> Aggregated:
    """Average what the clients returned, each by its share of the samples.

    Algorithm 1 of the paper, over the clients that take part in the round:

        W <- sum_k (n_k / n) W_k ,   n = sum_k n_k

    Sums are in float64, so clients that agree give back what they agree on.

    Args:
        clients: One tensor as each client returned it.
        counts: Samples that each learned from; a client of none is left out.
        uniform: Let all clients count alike: 1 / K in place of n_k / n.

    Raises:
        UserError: Nobody takes part, or what came does not fit or is no number.
    """
    present, shares = participants(clients, counts)
    if uniform:
        shares = torch.full_like(shares, 1 / len(shares))
    return Aggregated(combined(present, shares))
