"""One round at the server: leave out what cannot be joined, and join the rest, layer by layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from layerwise.core import catalogue
from layerwise.core.catalogue import Method
from layerwise.core.results import Aggregated
from layerwise.core.telling.rounds import Global, Reply, unsound

# The loss of a whole model on examples that the server holds.
Proxy = Callable[[Mapping[str, Tensor]], Tensor]
# The name a method that takes the model as one vector has for its state.
WHOLE = ""


def join(
    held: Global,
    replies: Mapping[int, Reply | None],
    method: Method,
    options: Mapping[str, Any],
    learned: Set[str],
    proxy: Proxy | None = None,
) -> tuple[Global, dict[int, str]]:
    """The global model after a round, and the clients that were left out of it, with the reason.

    What is no parameter is no direction to learn: running statistics are averaged by samples
    whatever the method, and counters of whole numbers take the highest.

    Args:
        held: What the server has.
        replies: What each client sent; None for one that sent nothing.
        method: How they are joined.
        options: Of the method.
        learned: Names of the parameters.
        proxy: Loss on the server's own examples, for a method that reads it.
    """
    reasons = {client: unsound(held.tensors, reply) for client, reply in replies.items()}
    excluded = {client: reason for client, reason in reasons.items() if reason}
    sound = [reply for client, reply in replies.items() if client not in excluded and reply]
    if not sound:
        return Global(held.tensors, held.states, held.done + 1), excluded
    counts = torch.tensor([reply.count for reply in sound])
    tensors: dict[str, Tensor] = {}
    states: dict[str, Mapping[str, Tensor]] = {}
    for name, found in _joined(held, sound, counts, method, options, learned, proxy):
        tensors[name] = found.weight.to(held.tensors[name].dtype)
        if found.state:
            states[name] = found.state
    ordered = {name: tensors[name] for name in held.tensors}
    if method.unit == "model":
        states = {WHOLE: states[next(iter(states))]} if states else {}
    return Global(ordered, states, held.done + 1), excluded


def _joined(
    held: Global,
    replies: Sequence[Reply],
    counts: Tensor,
    method: Method,
    options: Mapping[str, Any],
    learned: Set[str],
    proxy: Proxy | None,
) -> Iterator[tuple[str, Aggregated]]:
    average = catalogue.get("federate/fedavg").run
    masked = [name for name, state in held.states.items() if "kept" in state][::-1]
    if method.unit == "model":
        yield from _as_one(held, replies, counts, method, options, learned, proxy)
    for name, tensor in held.tensors.items():
        if not tensor.is_floating_point():
            highest = torch.stack([reply.tensors[name] for reply in replies]).amax(dim=0)
            yield name, Aggregated(highest)
            continue
        clients = torch.stack([reply.tensors[name] for reply in replies])
        if name not in learned:
            yield name, average(clients, counts)
        elif method.unit != "model":
            given: dict[str, Any] = {
                "server": tensor,
                "clients": clients,
                "counts": counts,
                "state": held.states.get(name, {}),
                "place": (masked.index(name) if name in masked else 0, max(len(masked), 1)),
            }
            if "grads" in method.evidence:
                given["grads"] = torch.stack([reply.grads[name] for reply in replies])
            yield name, method.run(**{word: given[word] for word in method.evidence}, **options)


def _as_one(
    held: Global,
    replies: Sequence[Reply],
    counts: Tensor,
    method: Method,
    options: Mapping[str, Any],
    learned: Set[str],
    proxy: Proxy | None,
) -> Iterator[tuple[str, Aggregated]]:
    """The parameters of a method that joins the whole model, given as one vector."""
    names = [name for name in held.tensors if name in learned]
    sizes = [held.tensors[name].numel() for name in names]

    def parts(vector: Tensor) -> dict[str, Tensor]:
        cut = vector.split(sizes)
        return {
            name: part.reshape(held.tensors[name].shape)
            for name, part in zip(names, cut, strict=True)
        }

    def flat(tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([tensors[name].flatten() for name in names])

    def of_vector(vector: Tensor) -> Tensor:
        return _known(proxy)({**held.tensors, **parts(vector)})

    given: dict[str, Any] = {
        "server": flat(held.tensors),
        "clients": torch.stack([flat(reply.tensors) for reply in replies]),
        "counts": counts,
        "state": held.states.get(WHOLE, {}),
        "proxy": of_vector,
    }
    found = method.run(**{word: given[word] for word in method.evidence}, **options)
    for name, part in parts(found.weight).items():
        yield name, Aggregated(part, found.state)


def _known(proxy: Proxy | None) -> Proxy:
    assert proxy is not None, "a method that reads the proxy was given none"
    return proxy
