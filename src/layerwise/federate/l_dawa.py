"""L-DAWA: a client counts in a layer as far as it went the global model's way there."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Float64, Integer
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.results import Aggregated
from layerwise.core.verbs import federator
from layerwise.federate._clients import combined, participants

_SOURCE = "README: CIFAR-10 across silos, 1 local epoch: 81.96% against 77.91%"


@federator(
    Paper(
        "L-DAWA: Layer-wise Divergence Aware Weight Aggregation in Federated Self-Supervised "
        "Visual Representation Learning",
        2023,
        "2307.07393",
    ),
    claims=(
        Claim("fedavg", "digits-clients/federate", {"epochs": 3, "fault": "noise"}, 0.25, _SOURCE),
        Claim("fedavg", "digits-clients/federate", {"alpha": 0.1, "epochs": 1}, 0.05, _SOURCE),
    ),
)
def l_dawa(
    server: Float[Tensor, "..."],
    clients: Float[Tensor, "clients ..."],
    counts: Integer[Tensor, " _"],
    state: Mapping[str, Tensor],
    *,
    normalise: bool = True,
    by_samples: bool = False,
    warmup: int = 0,
) -> Aggregated:
    """Weigh each client, layer by layer, by the cosine between its tensor and the global one.

    A client whose layer turned away from the global model's counts less in that layer:

        v_k = <W_k, W> / (||W_k|| ||W||) ,   a_k = max(v_k, 0) / sum_j max(v_j, 0)
        W  <- sum_k a_k W_k

    Unlike the paper, whose official code divides by K, the weights sum to 1, so that no layer
    shrinks round by round where no normalisation undoes it; `normalise=False` is that code:

        W <- (1 / K) sum_k v_k W_k

    A single number, and a tensor that is all zero at the server, have no direction: they are
    averaged by samples, and so is a layer that every client turned away from.  With
    `normalise=False` a client's tensor of zeros has v_k = 1, as in the official code.

    Args:
        server: The tensor that the clients were sent.
        clients: What each of them returned.
        counts: Samples that each learned from; a client of none is left out.  Beside that, they
            count in the warm-up and with `by_samples`.
        state: Rounds done so far.
        normalise: Divide by the sum of the cosines, those below 0 taken for 0.
        by_samples: Weigh each cosine by the client's share of the samples too.
        warmup: Rounds that average by samples first; the official script for CIFAR-10 has 3.

    Raises:
        UserError: Nobody takes part, what came does not fit or is no number, or the warm-up is
            below 0.
    """
    if warmup < 0:
        raise UserError(f"a warm-up of {warmup} rounds is none.", "Give 0 or more.")
    present, shares = participants(clients, counts, server)
    done = state.get("rounds", torch.zeros((), dtype=torch.int64))
    weights = shares
    if int(done) >= warmup and server.dim() > 0 and bool(server.any()):
        cosines = _cosines(server, present)
        parts = shares if by_samples else torch.full_like(shares, 1 / len(shares))
        weights = cosines * parts
        if normalise:
            trusted = weights.clamp(min=0)
            weights = trusted / trusted.sum() if bool(trusted.any()) else shares
    return Aggregated(combined(present, weights), {"rounds": done + 1})


def _cosines(
    server: Float[Tensor, "..."], clients: Float[Tensor, "clients ..."]
) -> Float64[Tensor, " clients"]:
    """The cosine of each client's tensor with the server's, at most 1; 1 for zeros."""
    way = _direction(server)
    found = [_direction(client) @ way if bool(client.any()) else 1.0 for client in clients]
    return torch.tensor([float(one) for one in found], dtype=torch.float64).clamp(max=1.0)


def _direction(tensor: Float[Tensor, "..."]) -> Float64[Tensor, " entries"]:
    flat = tensor.double().flatten()
    return flat / flat.norm()
