"""What every way to join clients shares: who takes part, and sums over them."""

import torch
from jaxtyping import Float, Float64, Integer
from torch import Tensor

from layerwise.core.errors import UserError


def participants(
    clients: Float[Tensor, "clients ..."],
    counts: Integer[Tensor, " _"],
    server: Float[Tensor, "..."] | None = None,
) -> tuple[Float[Tensor, "present ..."], Float64[Tensor, " present"]]:
    """The clients that learned from any sample, and the share of all samples that each has.

    Args:
        clients: One tensor as each client returned it.
        counts: Samples that each learned from.
        server: The tensor that they were sent, where the method reads it.

    Raises:
        UserError: Nobody takes part, or what came does not fit or is no number.
    """
    if len(counts) != len(clients):
        raise UserError(
            f"{len(clients)} clients came with {len(counts)} counts of samples.",
            "Give one count for each client.",
        )
    if server is not None and server.shape != clients.shape[1:]:
        raise UserError(
            f"clients returned a tensor of {tuple(clients.shape[1:])} where the server's is of "
            f"{tuple(server.shape)}.",
            "Leave out clients whose model is another.",
        )
    if bool((counts < 0).any()):
        raise UserError(
            f"a client says it learned from {int(counts.min())} samples.",
            "Leave that client out, or correct its count.",
        )
    taking = counts > 0
    if not bool(taking.any()):
        raise UserError("no client learned from any sample.", "Keep the model for this round.")
    present = clients[taking]
    sound = present.isfinite().all() and (server is None or server.isfinite().all())
    if not bool(sound):
        raise UserError(
            "a client's tensor, or the server's, holds NaN or infinity.", "Leave that client out."
        )
    weights = counts[taking].double()
    return present, weights / weights.sum()


def combined(
    clients: Float[Tensor, "clients ..."], weights: Float64[Tensor, " clients"]
) -> Float[Tensor, "..."]:
    """The sum over clients of weight times tensor, added up in float64, in float32 or wider."""
    total = torch.zeros(clients.shape[1:], dtype=torch.float64, device=clients.device)
    for client, weight in zip(clients, weights.tolist(), strict=True):
        total.add_(client.double(), alpha=weight)
    return total.to(wide(clients))


def wide(tensor: Tensor) -> torch.dtype:
    """A tensor's dtype, or float32 where that is narrower."""
    return torch.promote_types(tensor.dtype, torch.float32)
