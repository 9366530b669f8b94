"""Laws of compensators."""

from typing import Any

import torch
from torch import Tensor

from layerwise.core.catalogue import Method
from layerwise.core.errors import UserError
from layerwise.core.results import LowRank
from layerwise.testing import cases


def rank_is_respected(method: Method) -> None:
    """The two factors are as thin as asked."""
    for name, weight in cases.weights().items():
        for rank in (1, min(weight.shape)):
            correction = _compensate(method, weight, rank)
            assert correction.left.shape == (weight.shape[0], rank), name
            assert correction.right.shape == (rank, weight.shape[1]), name


def never_hurts(method: Method) -> None:
    """The corrected layer errs no more than it did: in its outputs, where inputs are known."""
    for name, weight in cases.weights().items():
        given = cases.evidence((*method.evidence, "approximation", "gram"), weight)
        for rank in (1, min(4, *weight.shape)):
            after = _loss(method, given, _compensate(method, weight, rank).product())
            before = _loss(method, given, torch.zeros(weight.shape))
            assert after <= before * (1 + 1e-6), f"{name}, rank {rank}: {after} above {before}"


def more_rank_never_hurts(method: Method) -> None:
    """The error falls as the rank grows."""
    weight = cases.weights()["plain"]
    given = cases.evidence((*method.evidence, "approximation", "gram"), weight)
    losses = [
        _loss(method, given, _compensate(method, weight, rank).product()) for rank in (1, 4, 16, 48)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def full_rank_restores(method: Method) -> None:
    """At full rank a thousandth of the error is left at most."""
    for name, weight in cases.weights().items():
        given = cases.evidence((*method.evidence, "approximation", "gram"), weight)
        after = _loss(method, given, _compensate(method, weight, min(weight.shape)).product())
        assert after <= 1e-3 * _loss(method, given, torch.zeros(weight.shape)), name


def lower_ranks_are_parts_of_higher_ones(method: Method) -> None:
    """What is declared nested is: the first columns and rows are the lower rank's correction."""
    weight = cases.weights()["plain"]
    highest = _compensate(method, weight, 16)
    for rank in (1, 5, 16) if method.nested else ():
        alone, part = _compensate(method, weight, rank), highest.truncated(rank)
        difference = (alone.product() - part.product()).norm()
        assert difference <= 1e-4 * alone.product().norm(), rank


def nothing_to_repair_gives_nothing(method: Method) -> None:
    """A perfect approximation is left as it is."""
    for name, weight in cases.weights().items():
        given = {**cases.evidence(method.evidence, weight), "approximation": weight}
        assert not bool(method.run(**given, rank=1).product().any()), name


def refuses_an_impossible_rank(method: Method) -> None:
    """A rank that the layer does not have is the user's mistake."""
    for rank in (-1, 0, 49):
        assert str(rank) in _refusal(method, rank), rank


def _compensate(method: Method, weight: Tensor, rank: int) -> LowRank:
    return method.run(**cases.evidence(method.evidence, weight), rank=rank)


def _refusal(method: Method, rank: int) -> str:
    """What the method says to that rank; nothing if it accepts it."""
    try:
        _compensate(method, cases.weights()["plain"], rank)
    except UserError as error:
        return error.problem
    return ""


def _loss(method: Method, given: Any, product: Tensor) -> float:
    left = given["weight"].double() - given["approximation"].double() - product.double()
    seen = left @ given["gram"].double() if "gram" in method.evidence else left
    return float((seen * left).sum())
