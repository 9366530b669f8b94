"""FedAvgM: averaging with momentum at the server."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.results import Aggregated
from layerwise.core.verbs import federator
from layerwise.federate._clients import wide
from layerwise.federate._server_steps import check_step, mean_change


@federator(
    Paper(
        "Measuring the Effects of Non-Identical Data Distribution for Federated Visual "
        "Classification",
        2019,
        "1909.06335",
    )
)
def fedavgm(
    server: Float[Tensor, "..."],
    clients: Float[Tensor, "clients ..."],
    counts: Integer[Tensor, " _"],
    state: Mapping[str, Tensor],
    *,
    rate: float = 1.0,
    beta: float = 0.9,
) -> Aggregated:
    """Let the mean change of the clients gather speed over the rounds.

        D = sum_k (n_k / n) W_k - W
        m <- beta m + D
        W <- W + rate m

    With beta 0 and rate 1 it is FedAvg, and so is the first round at that rate.

    Args:
        server: The tensor that the clients were sent.
        clients: What each of them returned.
        counts: Samples that each learned from; a client of none is left out.
        state: m.
        rate: Step of the server.
        beta: How much of m stays.

    Raises:
        UserError: Nobody takes part, what came does not fit or is no number, or an option is out
            of its range.
    """
    check_step(rate, beta)
    change = mean_change(server, clients, counts)
    speed = beta * state.get("speed", torch.zeros_like(change)) + change
    return Aggregated((server.double() + rate * speed).to(wide(server)), {"speed": speed})
