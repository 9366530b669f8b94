import pytest
import torch

from layerwise.core.errors import UserError
from layerwise.federate.fedavg import fedavg
from layerwise.federate.fedlaw import fedlaw

COUNTS = torch.tensor([10, 30, 60])


def test_no_step_is_fedavg():
    clients = torch.randn(3, 20)
    joined = fedlaw(clients, COUNTS, lambda tried: tried.sum(), {}, steps=0)
    assert torch.equal(joined.weight, fedavg(clients, COUNTS).weight)


def test_is_adam_on_the_definition():
    clients, target = torch.randn(3, 20, dtype=torch.float64), torch.randn(20).double()

    def proxy(tried):
        return (tried - target).pow(4).mean()

    x = torch.cat([torch.zeros(1), (COUNTS / COUNTS.sum()).log()]).double().requires_grad_()
    adam = torch.optim.Adam([x], lr=0.05, betas=(0.5, 0.999))
    for _ in range(15):
        loss = proxy(x[0].exp() * (x[1:].softmax(0)[:, None] * clients).sum(0))
        adam.zero_grad()
        loss.backward()
        adam.step()
    by_hand = (x[0].exp() * (x[1:].softmax(0)[:, None] * clients).sum(0)).detach()
    joined = fedlaw(clients, COUNTS, proxy, {}, steps=15, rate=0.05)
    assert torch.allclose(joined.weight, by_hand, atol=1e-6)
    assert float(joined.state["factor"]) == pytest.approx(float(x[0].detach().exp()), rel=1e-6)


def test_finds_the_client_that_the_proxy_likes():
    clients = torch.randn(3, 20)
    target = 1.5 * clients[0]
    joined = fedlaw(
        clients, COUNTS, lambda tried: (tried - target).square().mean(), {}, steps=600, rate=0.05
    )
    assert torch.allclose(joined.weight, target, atol=0.1)
    assert float(joined.state["factor"]) == pytest.approx(1.5, abs=0.06)


def test_clients_that_agree_are_only_shrunk():
    client = torch.randn(20)
    joined = fedlaw(
        torch.stack([client] * 3), COUNTS, lambda tried: tried.square().sum(), {}, steps=20
    )
    factor = joined.state["factor"].float()
    assert torch.allclose(joined.weight, factor * client)
    assert float(factor) < 1


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"rate": 0.0}])
def test_refuses_what_is_no_step(wrong):
    with pytest.raises(UserError, match="learn nothing"):
        fedlaw(torch.randn(3, 4), COUNTS, lambda tried: tried.sum(), {}, **wrong)
