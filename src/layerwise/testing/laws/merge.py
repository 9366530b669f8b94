"""Laws of merges."""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from layerwise.core.catalogue import Method
from layerwise.testing import cases

# Evidence with one entry for each model.
_OF_EACH = ("models", "shares", "cuts", "seeds", "grams", "fishers", "networks")


def answers_in_the_models_shape(method: Method) -> None:
    """A merged tensor is a float32 tensor of the shape of its parents, or one for every name."""
    for name, given in _cases(method):
        wanted = _parents(given)[0]
        made = _run(method, given)
        assert made.keys() == wanted.keys(), name
        for key, tensor in made.items():
            assert tensor.dtype == torch.float32, name
            assert tensor.shape == wanted[key].shape, name


def copies_give_the_copy(method: Method) -> None:
    """Copies of one model, which is also the base, give that model bit for bit."""
    for name, given in _cases(method):
        first = _parents(given)[0]
        same = given | _copies(given)
        made = _run(method, same)
        assert all(torch.equal(made[key], first[key]) for key in first), name


def ignores_the_order_of_models(method: Method) -> None:
    """Whichever model comes first, the result is the same but for the rounding of sums."""
    for name, given in _cases(method):
        if len(_parents(given)) == 1:
            continue
        forward, back = _run(method, given), _run(method, _turned(given))
        scale = max(float(one.abs().max()) for one in forward.values())
        for key, tensor in forward.items():
            assert bool(((tensor - back[key]).abs() <= 1e-4 * scale).all()), name


def ignores_the_unit_of_the_weights(method: Method) -> None:
    """Models in another unit, a power of two, give the same model in that unit."""
    for name, given in _cases(method):
        unit = 2.0**-6
        made, scaled = _run(method, given), _run(method, _scaled(given, unit))
        for key, tensor in made.items():
            error = (scaled[key] / unit - tensor).abs().max()
            assert float(error) <= 1e-5 * float(tensor.abs().max()), name


def no_share_leaves_the_base(method: Method) -> None:
    """Where a base is read, models that count nothing leave it as it is, bit for bit."""
    if not {"base", "shares"} <= set(method.evidence):
        return
    for name, given in _cases(method):
        none = given | {"shares": torch.zeros_like(given["shares"])}
        assert torch.equal(_run(method, none)[""], given["base"]), name


def entries_keep_their_word(method: Method) -> None:
    """Where entries do not hang together, a tensor cut anywhere gives the same bits."""
    if method.rows != "entry":
        return
    for name, given in _cases(method):
        whole = _run(method, given)[""].reshape(-1)
        flat = _flat(given)
        cuts = [0, 1, 7, len(whole) // 2, len(whole)]
        for start, stop in itertools.pairwise(cuts):
            part = _run(method, {key: _part(key, one, start, stop) for key, one in flat.items()})
            assert torch.equal(part[""], whole[start:stop]), name


def _cases(method: Method) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    for name, weight in cases.weights().items():
        given = dict(cases.evidence(method.evidence, weight, models=cases.models_of(method)))
        found.append((name, given))
    return found


def _run(method: Method, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The result by name; "" where it is one tensor."""
    weight = next(iter(_parents(given)[0].values()))
    made = method.run(**given, **cases.options(method, weight.reshape(len(weight), -1)))
    return {"": made} if isinstance(made, Tensor) else {key: made[key] for key in made}


def _parents(given: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    if "networks" in given:
        return [dict(one) for one in given["networks"]]
    return [{"": one} for one in given["models"]]


def _copies(given: Mapping[str, Any]) -> dict[str, Any]:
    if "networks" in given:
        first = given["networks"][0]
        same: dict[str, Any] = {"networks": [dict(first) for _ in given["networks"]]}
        return same | ({"origin": dict(first)} if "origin" in given else {})
    first = given["models"][0]
    same = {"models": torch.stack([first] * len(given["models"]))}
    if "products" in given:
        square = first.double().square().sum()
        same["products"] = square.expand(len(given["models"]), len(given["models"]))
    return same | ({"base": first.clone()} if "base" in given else {})


def _turned(given: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(given)
    for word in _OF_EACH:
        if isinstance(one := given.get(word), Tensor):
            made[word] = one.flip(0)
        elif one is not None:
            made[word] = list(one)[::-1]
    if "products" in given:
        made["products"] = given["products"].flip(0, 1)
    if "first" in given:
        made["first"] = len(given["networks"]) - 1 - given["first"]
    return made


def _scaled(given: Mapping[str, Any], unit: float) -> dict[str, Any]:
    made = dict(given)
    for word in ("models", "base", "cuts"):
        if word in given:
            made[word] = given[word] * unit
    if "products" in given:
        made["products"] = given["products"] * unit**2
    if "networks" in given:
        made["networks"] = [
            {key: one * unit for key, one in each.items()} for each in given["networks"]
        ]
    if "origin" in given:
        made["origin"] = {key: one * unit for key, one in given["origin"].items()}
    if "loss" in given:
        made["loss"] = functools.partial(_loss_in, unit, given["loss"])
    return made


def _loss_in(unit: float, loss: Any, network: Mapping[str, Tensor]) -> float:
    return loss({name: one / unit for name, one in network.items()})


def _flat(given: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(given)
    for word in ("models", "fishers"):
        if isinstance(one := given.get(word), Tensor):
            made[word] = one.reshape(len(one), -1)
    for word in ("base", "entries"):
        if word in given:
            made[word] = given[word].reshape(-1)
    return made


def _part(word: str, value: Any, start: int, stop: int) -> Any:
    if word in ("models", "fishers") and isinstance(value, Tensor):
        return value[:, start:stop]
    return value[start:stop] if word in ("base", "entries") else value
