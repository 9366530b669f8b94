"""A broken method for each law of what joins clients."""

import torch
from testing.broken import broken

from layerwise.core.results import Aggregated
from layerwise.federate.fedavg import fedavg
from layerwise.federate.fedavgm import fedavgm


def divides_by_one_more(clients, counts):
    return Aggregated(clients.float().sum(dim=0) / (len(clients) + 1))


def always_takes_a_step(server, clients, counts):
    return Aggregated(fedavg(clients, counts).weight + 0.1)


def believes_the_first(clients, counts):
    return Aggregated(clients[0].float())


def counts_everybody(clients, counts):
    return Aggregated(clients.float().mean(dim=0))


def counts_one_more(clients, counts):
    return fedavg(clients, counts + 1)


def clips_at_three(clients, counts):
    return fedavg(clients.clamp(-3, 3), counts)


def remembers_elsewhere(server, clients, counts, state):
    joined = fedavgm(server, clients, counts, state)
    return Aggregated(joined.weight, _Attached(joined.state))


class _Attached(dict):
    """What a file would not hold."""

    def get(self, name, default=None):
        return 2 * super().get(name, default)


def repairs_in_silence(clients, counts):
    sound = clients.nan_to_num(0, 0, 0) if len(clients) else torch.zeros(1, 48, 256)
    return Aggregated(sound.float().mean(dim=0))


BROKEN = {
    "equal_clients_give_that_client": broken("federate", divides_by_one_more),
    "unchanged_clients_change_nothing": broken("federate", always_takes_a_step),
    "ignores_the_order_of_clients": broken("federate", believes_the_first),
    "a_client_without_samples_does_not_count": broken("federate", counts_everybody),
    "ignores_the_unit_of_the_samples": broken("federate", counts_one_more),
    "powers_of_two_pass_through": broken("federate", clips_at_three),
    "goes_on_where_it_stopped": broken("federate", remembers_elsewhere),
    "refuses_nonsense": broken("federate", repairs_in_silence),
}
