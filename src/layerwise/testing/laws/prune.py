"""Laws of pruners."""

from typing import Any

import torch
from torch import Tensor

from layerwise.core.catalogue import EVIDENCE, Method
from layerwise.core.errors import UserError
from layerwise.core.results import Pruned
from layerwise.testing import cases

DENSITIES = (0.1, 0.5, 0.75)


def keeps_the_asked_density(method: Method) -> None:
    """The count is right to within one weight: in each row if rows are independent."""
    for name, weight in cases.weights().items():
        for density in DENSITIES:
            kept = _prune(method, weight, density).kept
            assert kept.shape == weight.shape, name
            sets = kept if method.rows == "independent" else kept.reshape(1, -1)
            asked = density * sets.shape[1]
            assert bool(((sets.sum(dim=1) - asked).abs() <= 1).all()), name


def removed_is_zero(method: Method) -> None:
    """Where a weight is not kept there is exactly 0.0."""
    for name, weight in cases.weights().items():
        pruned = _prune(method, weight, 0.5)
        assert pruned.weight.shape == weight.shape, name
        assert bool((pruned.weight[~pruned.kept] == 0).all()), name


def full_density_changes_nothing(method: Method) -> None:
    """At density 1 every weight stays, bit for bit."""
    for name, weight in cases.weights().items():
        pruned = _prune(method, weight, 1.0)
        assert bool(pruned.kept.all()), name
        assert torch.equal(pruned.weight.double(), weight.double()), name


def pruning_again_changes_nothing(method: Method) -> None:
    """Weights that are gone count as removed, so the same density finds nothing more to do."""
    for name, weight in cases.weights().items():
        once = _prune(method, weight, 0.5).weight
        assert torch.equal(_prune(method, once, 0.5).weight, once), name


def a_higher_density_never_hurts(method: Method) -> None:
    """The error falls as more weights stay: of the outputs, where inputs are known."""
    weight = cases.weights()["plain"]
    losses = [
        _loss(method, weight, _prune(method, weight, density)) for density in (*DENSITIES, 1.0)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def ignores_the_unit_of_the_weights(method: Method) -> None:
    """A layer in smaller units keeps the same weights."""
    for name, given in cases.weights().items():
        weight = given.float()  # whose range has room for both
        kept = _prune(method, weight, 0.5).kept
        assert torch.equal(_prune(method, weight * 2.0**-20, 0.5).kept, kept), name


def a_dead_input_goes_first(method: Method) -> None:
    """A method that saw the inputs keeps no weight on one that is always zero."""
    weight = cases.weights()["plain"]
    if all(EVIDENCE[word] != "calibration" for word in method.evidence):
        return
    dead = cases.evidence(("gram",), weight)["gram"].diagonal() == 0
    assert bool(dead.any())
    assert not bool(_prune(method, weight, 0.5).kept[:, dead].any())


def refuses_an_impossible_density(method: Method) -> None:
    """A density that is no fraction of the weights is the user's mistake."""
    for density in (-0.5, 0.0, 1.5, float("nan")):
        assert str(density) in _refusal(method, density), density


def _prune(method: Method, weight: Tensor, density: float) -> Pruned:
    return method.run(**cases.evidence(method.evidence, weight), density=density)


def _refusal(method: Method, density: float) -> str:
    """What the method says to that density; nothing if it accepts it."""
    try:
        _prune(method, cases.weights()["plain"], density)
    except UserError as error:
        return error.problem
    return ""


def _loss(method: Method, weight: Tensor, pruned: Pruned) -> float:
    change = pruned.weight.double() - weight.double()
    given: dict[str, Any] = dict(cases.evidence(("gram",), weight))
    seen = change @ given["gram"].double() if "gram" in method.evidence else change
    return float((seen * change).sum())
