"""Laws of measures."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layerwise.core.catalogue import Method
from layerwise.core.results import record
from layerwise.testing import cases

# Evidence with one row per token.
_TOKENS = (
    "inputs",
    "outputs",
    "disturbed",
    "base_outputs",
    "base_states",
    "later_states",
    "positions",
    "updates",
)
# Evidence of windows, and the axis along which they lie.
_WINDOWS = {"ids": 0, "skip_effects": 1, "freeze_effects": 1, "echoes": 0, "attributions": 0}
_ANSWERS = ("answers", "lens", "removed", "skipped", "frozen", "erased")
# What evidence is of a block that does nothing.
_IDLE: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "outputs": lambda given: given["inputs"],
    "jacobian": lambda given: torch.clone,
    "updates": lambda given: [torch.zeros_like(one) for one in given["updates"]],
    **dict.fromkeys(_ANSWERS[1:], lambda given: given["answers"]),
    "skip_effects": lambda given: torch.zeros_like(given["skip_effects"]),
    "freeze_effects": lambda given: torch.zeros_like(given["freeze_effects"]),
}


def answers_one_finite_number(method: Method) -> None:
    """A score is one ordinary number, not a tensor and not NaN, and so is all beside it."""
    names: set[tuple[str, ...]] = set()
    for name, given in _layers(method):
        answer = method.run(**given)
        known = answer if isinstance(answer, Mapping) else {"": answer}
        assert all(isinstance(one, float) and math.isfinite(one) for one in known.values()), name
        names.add(tuple(known))
    assert len(names) == 1, "the names of a record differ"
    assert names != {()}, "a record is empty"


def says_finite_numbers_of_the_model(method: Method) -> None:
    """What it says of all blocks together are ordinary numbers, even of one block."""
    if method.across is None:
        return
    found = [record(method.run(**given)) for _, given in _layers(method)]
    for records in (found, found[:1], [found[-1]] * 3):
        told = method.across(records)
        assert all(isinstance(one, float) and math.isfinite(one) for one in told.values())


def a_perfect_approximation_has_no_error(method: Method) -> None:
    """Where an approximation is judged, the weight itself scores 0 and nothing scores less."""
    if "approximation" not in method.evidence:
        return
    for name, given in _layers(method):
        assert _score(method, {**given, "approximation": given["weight"]}) == 0, name
        assert _score(method, given) >= 0, name


def a_worse_approximation_scores_higher(method: Method) -> None:
    """Where an approximation is judged, twice the error is worse."""
    if "approximation" not in method.evidence:
        return
    given = dict(_layers(method))["plain"]
    error = given["approximation"] - given["weight"]
    scores = [
        _score(method, {**given, "approximation": given["weight"] + factor * error})
        for factor in (0.0, 0.5, 1.0, 2.0)
    ]
    assert scores == sorted(set(scores))


def nothing_scores_less_than_what_did_not_move(method: Method) -> None:
    """Where a layer or a block is held against that of another model, the same one is lowest."""
    pairs = {"base": "weight", "base_outputs": "outputs", "base_tangents": "tangents"}
    for other, own in pairs.items():
        if not {other, own} <= set(method.evidence):
            continue
        for name, given in _layers(method):
            noise = torch.randn(given[own].shape, generator=torch.Generator().manual_seed(0))
            moved = _score(method, {**given, other: given[own].float() + noise})
            assert _score(method, {**given, other: given[own]}) <= moved + 1e-6, name


def a_block_that_does_nothing_scores_least(method: Method) -> None:
    """Where it is seen what a block does, one that does nothing is no more important."""
    if method.unit == "layer" or not {"inputs", "answers"}.intersection(method.evidence):
        return
    for name, given in _layers(method):
        idle = {**given, **{word: _IDLE[word](given) for word in given if word in _IDLE}}
        assert _score(method, idle) <= _score(method, given), name


def states_that_tell_the_class_score_more(method: Method) -> None:
    """Where labelled texts are read, states that are their labels score above equal ones."""
    if "labels" not in method.evidence:
        return
    given = dict(_layers(method))["plain"]
    telling = torch.nn.functional.one_hot(given["labels"]).float()
    assert _score(method, {**given, "states": telling}) > _score(
        method, {**given, "states": torch.ones_like(telling)}
    )


def ignores_what_classes_are_called(method: Method) -> None:
    """Where labelled texts are read, it does not matter which class has which number."""
    if "labels" not in method.evidence:
        return
    for name, given in _layers(method):
        moved = {**given, "labels": given["labels"].max() - given["labels"]}
        assert math.isclose(_score(method, moved), _score(method, given), rel_tol=1e-3), name


def ignores_the_order_of_tokens(method: Method) -> None:
    """Where tokens are read, it does not matter which came first."""
    for name, given in _layers(method):
        read = [word for word in _TOKENS if word in given]
        moved = {**given, **{word: _flipped(given[word]) for word in read}}
        assert _close(method.run(**moved), method.run(**given)), name


def ignores_the_order_of_windows(method: Method) -> None:
    """Where answers to windows are read, it does not matter which window came first."""
    if not {*_WINDOWS, *_ANSWERS}.intersection(method.evidence):
        return
    for name, given in _layers(method):
        moved = {**given, **{w: given[w].flip(axis) for w, axis in _WINDOWS.items() if w in given}}
        moved |= {word: _flipped(given[word])[::-1] for word in _ANSWERS if word in given}
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


def _score(method: Method, given: Mapping[str, Any]) -> float:
    return next(iter(record(method.run(**given)).values()))


def _flipped(given: Tensor | Sequence[Tensor]) -> Any:
    """The other way round along the first axis, of one tensor or of each of several."""
    return given.flip(0) if isinstance(given, Tensor) else [one.flip(0) for one in given]


def _close(ours: float | Mapping[str, float], theirs: float | Mapping[str, float]) -> bool:
    """Equal but for the order in which sums were rounded."""
    one, other = record(ours), record(theirs)
    return one.keys() == other.keys() and all(
        math.isclose(one[name], other[name], rel_tol=1e-5, abs_tol=1e-6) for name in one
    )
