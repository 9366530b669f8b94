"""Laws of measures."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from layerwise.core.catalogue import Method
from layerwise.testing import cases

# Evidence with one row per token.
_TOKENS = ("inputs", "outputs", "disturbed", "base_outputs")


def answers_one_finite_number(method: Method) -> None:
    """A score is one ordinary number, not a tensor and not NaN."""
    for name, given in _layers(method):
        score = method.run(**given)
        assert isinstance(score, float), name
        assert math.isfinite(score), name


def a_perfect_approximation_has_no_error(method: Method) -> None:
    """Where an approximation is judged, the weight itself scores 0 and nothing scores less."""
    if "approximation" not in method.evidence:
        return
    for name, given in _layers(method):
        assert method.run(**{**given, "approximation": given["weight"]}) == 0, name
        assert method.run(**given) >= 0, name


def a_worse_approximation_scores_higher(method: Method) -> None:
    """Where an approximation is judged, twice the error is worse."""
    if "approximation" not in method.evidence:
        return
    given = dict(_layers(method))["plain"]
    error = given["approximation"] - given["weight"]
    scores = [
        method.run(**{**given, "approximation": given["weight"] + factor * error})
        for factor in (0.0, 0.5, 1.0, 2.0)
    ]
    assert scores == sorted(set(scores))


def nothing_scores_less_than_what_did_not_move(method: Method) -> None:
    """Where a layer or a block is held against that of another model, the same one is lowest."""
    pairs = {"base": "weight", "base_outputs": "outputs"}
    for other, own in pairs.items():
        if not {other, own} <= set(method.evidence):
            continue
        for name, given in _layers(method):
            noise = torch.randn(given[own].shape, generator=torch.Generator().manual_seed(0))
            moved = method.run(**{**given, other: given[own].float() + noise})
            assert method.run(**{**given, other: given[own]}) <= moved + 1e-6, name


def ignores_the_order_of_tokens(method: Method) -> None:
    """Where tokens are read, it does not matter which came first."""
    for name, given in _layers(method):
        read = [word for word in _TOKENS if word in given]
        moved = {**given, **{word: given[word].flip(0) for word in read}}
        assert _close(method.run(**moved), method.run(**given)), name


def ignores_the_order_of_layers(method: Method) -> None:
    """Where several layers are read, it does not matter which came first."""
    if "weights" not in method.evidence:
        return
    for name, given in _layers(method):
        each = [word for word in ("weights", "norms") if word in given]
        moved = {**given, **{word: list(given[word])[::-1] for word in each}}
        assert _close(method.run(**moved), method.run(**given)), name


def _layers(method: Method) -> Iterator[tuple[str, dict[str, Any]]]:
    """Evidence for every layer to try; a block answers in the width it was asked in."""
    for name, weight in cases.weights().items():
        side = min(weight.shape)
        given = weight[:side, :side] if method.unit == "block" else weight
        yield name, dict(cases.evidence(method.evidence, given))


def _close(ours: float, theirs: float) -> bool:
    """Equal but for the order in which sums were rounded."""
    return math.isclose(ours, theirs, rel_tol=1e-5, abs_tol=1e-6)
