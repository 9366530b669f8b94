"""FedLAW: what each client counts, and how far the sum is shrunk, learned at the server."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.results import Aggregated
from layerwise.core.verbs import federator
from layerwise.federate._clients import combined, participants, wide

_SOURCE = "above FedAvg on CIFAR-10 with skewed clients; the margin is of card 004"


@federator(
    Paper(
        "Revisiting Weighted Aggregation in Federated Learning with Neural Networks",
        2023,
        "2302.10911",
    ),
    claims=(
        Claim("fedavg", "digits-clients/federate", {"alpha": 0.1, "epochs": 5}, 0.25, _SOURCE),
    ),
    exempt={
        "unchanged_clients_change_nothing": "the whole model is shrunk as the proxy asks",
        "powers_of_two_pass_through": "the proxy is not scaled",
    },
    unit="model",
)
def fedlaw(
    clients: Float[Tensor, "clients ..."],
    counts: Integer[Tensor, " _"],
    proxy: Callable[[Tensor], Tensor],
    state: Mapping[str, Tensor],
    *,
    steps: int = 50,
    rate: float = 0.01,
) -> Aggregated:
    """Learn a weight for each client and one factor for all on the server's own samples.

        W = gamma sum_k lambda_k W_k ,   lambda = softmax(x_1 .. x_K) ,   gamma = exp(x_0)

    x is learned anew each round by Adam (betas 0.5 and 0.999), from x_k = log(n_k / n) and x_0 = 0,
    which is FedAvg; clients stay as they are.  A derivative by x needs one by W alone:

        dL/dlambda_k = gamma <dL/dW, W_k> ,   dL/dgamma = <dL/dW, sum_k lambda_k W_k>

    gamma may be above 1, and is in early rounds.  No steps are FedAvg.

    Unlike the paper, each step reads all the server's samples and the rate does not fall; the
    official code has minibatches of 128 and halves the rate every 20 passes.

    Args:
        clients: The parameters that each client returned, as one vector.
        counts: Samples that each learned from; a client of none is left out.
        proxy: Loss of a model, given as such a vector, on samples that the server holds.
        state: Nothing is read of it; what was learned goes there to be looked at.
        steps: Steps of Adam.
        rate: Its rate; 0.01 on CIFAR-10 in the official code, 0.005 elsewhere.

    Raises:
        UserError: Nobody takes part, what came does not fit or is no number, or an option is out
            of its range.
    """
    if steps < 0 or not rate > 0:
        raise UserError(
            f"{steps} steps at a rate of {rate} learn nothing.",
            "Give 0 steps or more and a rate above 0.",
        )
    present, shares = participants(clients, counts)
    start = torch.cat([torch.zeros(1, dtype=torch.float64), shares.log()])
    learned = start.requires_grad_()
    descent = torch.optim.Adam([learned], lr=rate, betas=(0.5, 0.999))
    for _ in range(steps):
        with torch.no_grad():
            part = learned[1:].softmax(dim=0)
            factor = learned[0].exp()
            mean = combined(present, part)  # (...)
        moved = (float(factor) * mean).requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(proxy(moved), moved)
        slope = slope.double()
        by_part = torch.stack([(slope * client.double()).sum() for client in present]) * factor
        by_factor = (slope * mean.double()).sum()
        # Through the softmax and the exponential.
        inner = part * (by_part - part @ by_part)
        learned.grad = torch.cat([(by_factor * factor)[None], inner])
        descent.step()
    found = learned.detach()
    part, factor = found[1:].softmax(dim=0), found[0].exp()
    weight = combined(present, part * factor) if steps else combined(present, shares)
    return Aggregated(weight.to(wide(clients)), {"factor": factor})
