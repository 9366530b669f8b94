import pytest
import torch

from layerwise.core.errors import UserError
from layerwise.federate.fedavg import fedavg
from layerwise.federate.l_dawa import l_dawa

COUNTS = torch.tensor([1, 3, 4])


def slowly(server, clients, literal):
    weights = []
    for client in clients:
        pairs = [
            (float(a), float(b)) for a, b in zip(client.flatten(), server.flatten(), strict=True)
        ]
        inner = sum(a * b for a, b in pairs)
        sizes = sum(a * a for a, _ in pairs) * sum(b * b for _, b in pairs)
        weights.append(min(inner / sizes**0.5, 1.0))
    if literal:
        return sum(v * client for v, client in zip(weights, clients, strict=True)) / len(clients)
    trusted = [max(v, 0.0) for v in weights]
    return sum(v * client for v, client in zip(trusted, clients, strict=True)) / sum(trusted)


@pytest.mark.parametrize("literal", [False, True])
def test_is_the_definition(literal):
    server = torch.randn(5, 7)
    clients = torch.stack([server + 0.3 * torch.randn(5, 7), -server, torch.randn(5, 7)])
    joined = l_dawa(server, clients, COUNTS, {}, normalise=not literal)
    assert torch.allclose(joined.weight, slowly(server, clients, literal), atol=1e-6)


def test_a_client_that_went_elsewhere_does_not_count():
    server = torch.randn(50, 50)
    clients = torch.stack([server * 1.1, server * 0.9, 1.5 * torch.randn(50, 50)])
    joined = l_dawa(server, clients, COUNTS, {})
    assert (joined.weight - server).norm() < 0.1 * server.norm()
    assert (fedavg(clients, COUNTS).weight - server).norm() > 0.5 * server.norm()


@pytest.mark.parametrize("literal", [False, True])
def test_clients_that_changed_nothing(literal):
    server = torch.randn(5, 7)
    joined = l_dawa(server, torch.stack([server] * 3), COUNTS, {}, normalise=not literal)
    assert torch.equal(joined.weight, server)


def test_one_client_is_the_answer():
    server, client = torch.randn(5, 7), torch.randn(1, 5, 7)
    assert torch.equal(l_dawa(server, client, COUNTS[:1], {}).weight, client[0])


def test_the_size_of_the_server_does_not_count():
    server, clients = torch.randn(5, 7), torch.randn(3, 5, 7)
    joined, scaled = (l_dawa(factor * server, clients, COUNTS, {}) for factor in (1, 8))
    assert torch.equal(joined.weight, scaled.weight)


@pytest.mark.parametrize("server", [torch.zeros(4), torch.tensor(2.0)], ids=["zeros", "one number"])
def test_what_has_no_direction_is_averaged(server):
    clients = torch.randn(3, *server.shape)
    assert torch.equal(l_dawa(server, clients, COUNTS, {}).weight, fedavg(clients, COUNTS).weight)


def test_the_warm_up_averages_by_samples():
    server, clients, state = torch.randn(5, 7), torch.randn(3, 5, 7), {}
    average = fedavg(clients, COUNTS).weight
    for expected in (True, True, False):
        weight, state = l_dawa(server, clients, COUNTS, state, warmup=2)
        assert torch.equal(weight, average) is expected


def test_refuses_a_warm_up_below_zero():
    with pytest.raises(UserError, match="-1"):
        l_dawa(torch.ones(3), torch.ones(2, 3), COUNTS[:2], {}, warmup=-1)
