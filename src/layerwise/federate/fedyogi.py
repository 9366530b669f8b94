"""FedYogi: Yogi at the server, whose second moment forgets slowly."""

from collections.abc import Mapping

from jaxtyping import Float, Integer
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.results import Aggregated
from layerwise.core.verbs import federator
from layerwise.federate._server_steps import adaptive_step, mean_change


@federator(
    Paper("Adaptive Federated Optimization", 2021, "2003.00295"),
    exempt={
        "equal_clients_give_that_client": "the server takes a step of its own towards them",
        "powers_of_two_pass_through": "rate and tau are in the unit of the weights",
    },
)
def fedyogi(
    server: Float[Tensor, "..."],
    clients: Float[Tensor, "clients ..."],
    counts: Integer[Tensor, " _"],
    state: Mapping[str, Tensor],
    *,
    rate: float = 0.1,
    beta: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> Aggregated:
    """Take a step of Yogi along the mean change of the clients.

    The clients' mean change is a gradient with its sign turned (algorithm 2 of the paper):

        D = sum_k (n_k / n) W_k - W
        m <- beta m + (1 - beta) D
        v <- v - (1 - beta2) D^2 sign(v - D^2)
        W <- W + rate m / (sqrt(v) + tau)

    m and v begin at 0, without a correction for it, as in the paper.  An entry that always
    changes by less than tau hardly moves; a small tau makes the first steps all of one size.

    Args:
        server: The tensor that the clients were sent.
        clients: What each of them returned.
        counts: Samples that each learned from; a client of none is left out.
        state: m and v.
        rate: Step of the server, in the unit of the weights.
        beta: How much of m stays.
        beta2: How much of v stays.
        tau: Added to the root of v.

    Raises:
        UserError: Nobody takes part, what came does not fit or is no number, or an option is out
            of its range.
    """
    change = mean_change(server, clients, counts)
    return adaptive_step(
        server,
        change,
        state,
        lambda squares, new: squares - (1 - beta2) * new * (squares - new).sign(),
        rate=rate,
        beta=beta,
        tau=tau,
    )
