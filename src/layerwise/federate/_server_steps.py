"""Server optimizers: the mean change of the clients taken for a gradient."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Float64, Integer
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.results import Aggregated
from layerwise.federate._clients import combined, participants, wide

# What the running mean of squares becomes: of itself and of the squares of this round.
Second = Callable[[Tensor, Tensor], Tensor]


def mean_change(
    server: Float[Tensor, "..."],
    clients: Float[Tensor, "clients ..."],
    counts: Integer[Tensor, " _"],
) -> Float64[Tensor, "..."]:
    """D = sum_k (n_k / n) W_k - W."""
    present, shares = participants(clients, counts, server)
    return combined(present.double(), shares) - server.double()


def adaptive_step(
    server: Float[Tensor, "..."],
    change: Float64[Tensor, "..."],
    state: Mapping[str, Tensor],
    second: Second,
    *,
    rate: float,
    beta: float,
    tau: float,
) -> Aggregated:
    """M <- beta m + (1 - beta) D, v <- second(v, D^2), W <- W + rate m / (sqrt(v) + tau)."""
    check_step(rate, beta)
    if tau <= 0:
        raise UserError(f"tau is {tau}.", "Give a number above 0, such as 1e-3.")
    zero = torch.zeros_like(change)
    mean = beta * state.get("mean", zero) + (1 - beta) * change
    squares = second(state.get("squares", zero), change.square())
    moved = server.double() + rate * mean / (squares.sqrt() + tau)
    return Aggregated(moved.to(wide(server)), {"mean": mean, "squares": squares})


def check_step(rate: float, beta: float) -> None:
    """Refuse a step that is none.

    Raises:
        UserError: The rate is not above 0, or the momentum not in [0, 1).
    """
    if not rate > 0 or not 0 <= beta < 1:
        raise UserError(
            f"a server rate of {rate} with a momentum of {beta} is no step.",
            "Give a rate above 0 and a momentum in [0, 1).",
        )
