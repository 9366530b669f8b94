"""Laws of what joins clients."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from layerwise.core.catalogue import Method
from layerwise.core.errors import UserError
from layerwise.core.results import Aggregated
from layerwise.testing import cases

COUNTS = (30, 10, 60)


def equal_clients_give_that_client(method: Method) -> None:
    """What all clients agree on is the answer, whatever was before and whoever has more samples."""
    for name, weight in cases.weights().items():
        client = cases.evidence(("models",), weight)["models"][0]
        joined = _join(method, weight, clients=torch.stack([client] * 3))
        assert _close(joined.weight, client), name


def unchanged_clients_change_nothing(method: Method) -> None:
    """Clients that send back what they were sent leave the global model as it was."""
    for name, weight in cases.weights().items():
        joined = _join(method, weight, clients=torch.stack([weight] * 3))
        assert _close(joined.weight, weight), name


def ignores_the_order_of_clients(method: Method) -> None:
    """Clients are a set: in another order they give the same, to rounding."""
    turned = torch.tensor([2, 0, 1])
    for name, weight in cases.weights().items():
        clients = cases.evidence(("clients",), weight)["clients"]
        once = _join(method, weight, clients=clients)
        again = _join(method, weight, clients=clients[turned], counts=torch.tensor(COUNTS)[turned])
        assert _close(again.weight, once.weight, _rounding(method)), name


def a_client_without_samples_does_not_count(method: Method) -> None:
    """Whatever a client sends that learned from nothing, the others' answer stays."""
    for name, weight in cases.weights().items():
        clients = cases.evidence(("clients",), weight)["clients"]
        idle = torch.cat([clients, -3 * clients[:1]])
        once = _join(method, weight, clients=clients)
        again = _join(method, weight, clients=idle, counts=torch.tensor([*COUNTS, 0]))
        assert _close(again.weight, once.weight), name


def ignores_the_unit_of_the_samples(method: Method) -> None:
    """Ten times the samples everywhere change nothing: only shares count."""
    for name, weight in cases.weights().items():
        once = _join(method, weight)
        again = _join(method, weight, counts=10 * torch.tensor(COUNTS))
        assert _close(again.weight, once.weight), name


def powers_of_two_pass_through(method: Method) -> None:
    """Four times the weights are four times the result."""
    for name, given in cases.weights().items():
        weight = given.float()  # whose range has room for both
        clients = cases.evidence(("clients",), weight)["clients"]
        once = _join(method, weight, clients=clients)
        fourfold = _join(method, 4 * weight, clients=4 * clients)
        assert _close(fourfold.weight, 4 * once.weight), name


def goes_on_where_it_stopped(method: Method) -> None:
    """What it keeps are tensors that a file holds: read back, they give the same next rounds."""
    for name, weight in cases.weights().items():
        through: list[Tensor] = []
        for stopped in (False, True):
            joined = Aggregated(weight)
            for _ in range(3):
                state = _written(joined.state) if stopped else joined.state
                sent = joined.weight.to(weight.dtype)
                clients = cases.evidence(("clients",), sent)["clients"]
                joined = _join(method, sent, clients=clients, state=state)
            through.append(joined.weight)
        assert bool(through[0].isfinite().all()), name
        assert torch.equal(*through), name


def refuses_nonsense(method: Method) -> None:
    """Clients that do not fit, are no numbers or are nobody are the user's to put right."""
    weight = cases.weights()["plain"]
    clients = cases.evidence(("clients",), weight)["clients"]
    wrong: list[Mapping[str, Any]] = [
        {"counts": torch.tensor([1, 2])},
        {"counts": torch.tensor([1, -2, 3])},
        {"counts": torch.tensor([0, 0, 0])},
        {"clients": clients[:0], "counts": torch.zeros(0, dtype=torch.int64)},
    ]
    if "server" in method.evidence:
        wrong.append({"clients": clients[:, :-1]})
    for value in (math.nan, math.inf):
        spoilt = clients.clone()
        spoilt[1, 5, 7] = value
        wrong.append({"clients": spoilt})
    for changes in wrong:
        assert _refuses(method, weight, **changes), changes


def _join(method: Method, weight: Tensor, **changes: Any) -> Aggregated:
    given = {**cases.evidence(method.evidence, weight), "counts": torch.tensor(COUNTS)}
    given |= {name: value for name, value in changes.items() if name in given}
    return method.run(**given, **cases.options(method, weight))


def _close(ours: Tensor, theirs: Tensor, rounding: float = 1e-6) -> bool:
    """The same to rounding of float32."""
    ours, theirs = ours.double(), theirs.double()
    return bool((ours - theirs).norm() <= rounding * theirs.norm())


def _rounding(method: Method) -> float:
    """How far sums in another order may lead: further where many steps follow each other."""
    return 1e-4 if "steps" in method.options else 1e-6


def _written(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state that was in a file meanwhile."""
    return load(save({name: tensor.contiguous() for name, tensor in state.items()}))


def _refuses(method: Method, weight: Tensor, **changes: Any) -> bool:
    try:
        _join(method, weight, **changes)
    except UserError:
        return True
    return False
