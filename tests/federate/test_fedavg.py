import pytest
import torch

from layerwise.federate.fedadagrad import fedadagrad
from layerwise.federate.fedadam import fedadam
from layerwise.federate.fedavg import fedavg
from layerwise.federate.fedavgm import fedavgm
from layerwise.federate.fedyogi import fedyogi
from layerwise.federate.trimmed_mean import trimmed_mean

CLIENTS = torch.tensor([[1.0, 2.0], [3.0, -2.0], [100.0, 0.5]])
COUNTS = torch.tensor([1, 3, 4])


def test_each_client_counts_by_its_samples():
    by_hand = (CLIENTS[0] + 3 * CLIENTS[1] + 4 * CLIENTS[2]) / 8
    assert torch.equal(fedavg(CLIENTS, COUNTS).weight, by_hand)
    assert torch.allclose(fedavg(CLIENTS, COUNTS, uniform=True).weight, CLIENTS.mean(dim=0))


def test_one_step_of_each_client_is_one_step_of_all():
    """A full-batch step by each is that of gradient descent on all samples."""
    inputs, labels = torch.randn(12, 4, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    start = torch.randn(4, dtype=torch.float64)

    def stepped(rows):
        weight = start.clone().requires_grad_()
        (inputs[rows] @ weight - labels[rows]).square().mean().backward()
        return start - 0.1 * weight.grad

    parts = [range(2), range(2, 7), range(7, 12)]
    clients = torch.stack([stepped(list(part)) for part in parts])
    joined = fedavg(clients, torch.tensor([2, 5, 5])).weight
    assert torch.allclose(joined, stepped(list(range(12))), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("method", "second"),
    [
        (fedadam, lambda v, d: 0.99 * v + 0.01 * d**2),
        (fedyogi, lambda v, d: v - 0.01 * d**2 * (1 if v > d**2 else -1 if v < d**2 else 0)),
        (fedadagrad, lambda v, d: v + d**2),
    ],
)
def test_adaptive_servers_by_hand(method, second):
    server, state = torch.tensor([0.5]), {}
    weight, mean, squares = 0.5, 0.0, 0.0
    beta = 0.0 if method is fedadagrad else 0.9
    for step in range(4):
        clients = torch.stack([server + 1 / (step + 1), server - 0.2])
        server, state = method(server, clients, torch.tensor([2, 1]), state)
        change = (2 * (1 / (step + 1)) - 0.2) / 3
        mean = beta * mean + (1 - beta) * change
        squares = second(squares, change)
        weight += 0.1 * mean / (squares**0.5 + 1e-3)
        assert float(server) == pytest.approx(weight, rel=1e-5)


def test_momentum_gathers_speed():
    server, state = torch.zeros(1), {}
    for expected in (1.0, 2.9, 5.61):
        server, state = fedavgm(server, (server + 1)[None], torch.tensor([5]), state)
        assert float(server) == pytest.approx(expected, rel=1e-6)


def test_without_momentum_it_is_fedavg():
    joined = fedavgm(torch.zeros(2), CLIENTS, COUNTS, {}, beta=0.0)
    assert torch.allclose(joined.weight, fedavg(CLIENTS, COUNTS).weight)


def test_what_is_furthest_out_does_not_count():
    assert torch.equal(trimmed_mean(CLIENTS, COUNTS).weight, torch.tensor([3.0, 0.5]))
    many = torch.randn(10, 6)
    by_hand = many.sort(dim=0).values[1:-1].mean(dim=0)
    assert torch.allclose(trimmed_mean(many, torch.ones(10, dtype=torch.long)).weight, by_hand)
    halved = trimmed_mean(many[:9], torch.ones(9, dtype=torch.long), trimmed=0.5)
    assert torch.allclose(halved.weight, many[:9].median(dim=0).values)
