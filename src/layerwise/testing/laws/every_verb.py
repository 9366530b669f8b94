"""Laws of every method, whatever its verb."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from layerwise.core.catalogue import Method
from layerwise.testing import cases

# The axis along which evidence is cut when the rows of a weight are; the rest is shared.
_ROW_AXIS = {"weight": 0, "approximation": 0, "grad": 0, "base": 0, "outputs": 1, "models": 1}


def leaves_its_inputs_alone(method: Method) -> None:
    """A method is a pure function: nothing it was given changes."""
    for name, weight in cases.weights().items():
        given = cases.evidence(method.evidence, weight, models=cases.models_of(method))
        before = [tensor.clone() for tensor in _tensors(given)]
        method.run(**given, **cases.options(method, weight))
        assert _same(before, _tensors(given)), name


def repeats_itself(method: Method) -> None:
    """The same inputs give the same answer, whatever the global random state."""
    for name, weight in cases.weights().items():
        with torch.random.fork_rng():
            torch.manual_seed(1)
            first = _run(method, weight)
            torch.manual_seed(2)
            assert _same(first, _run(method, weight)), name


def is_finite(method: Method) -> None:
    """No input a trained network can contain makes NaN or infinity."""
    for name, weight in cases.weights().items():
        assert all(bool(tensor.isfinite().all()) for tensor in _run(method, weight)), name


def works_without_a_token(method: Method) -> None:
    """A layer that no token of the calibration text reached, as an expert may be, is no error."""
    for name, weight in cases.weights().items():
        models = cases.models_of(method)
        given = cases.evidence(method.evidence, weight, seen=False, models=models)
        made = _tensors(method.run(**given, **cases.options(method, weight)))
        assert all(bool(tensor.isfinite().all()) for tensor in made), name


def rows_keep_their_word(method: Method) -> None:
    """Independent rows give the same bits alone, in slices and stacked under other rows."""
    if method.rows != "independent":
        return
    for name, weight in cases.weights().items():
        given = cases.evidence(method.evidence, weight, models=cases.models_of(method))
        options = cases.options(method, weight)
        cuts = [1, 6, 13, len(weight) - 20] if len(weight) > 20 else [len(weight)]
        together = method.run(**given, **options).split(cuts)
        for place, (rows, part) in enumerate(zip(_cut(given, cuts), together, strict=True)):
            alone = method.run(**rows, **options)
            assert _same(_tensors(alone), _tensors(part)), f"{name}, part {place}"


def _cut(given: Mapping[str, Any], cuts: list[int]) -> Iterator[dict[str, Any]]:
    pieces = {
        word: given[word].split(cuts, dim=_ROW_AXIS[word]) for word in given if word in _ROW_AXIS
    }
    for place in range(len(cuts)):
        yield {**given, **{word: parts[place] for word, parts in pieces.items()}}


def _run(method: Method, weight: Tensor) -> list[Tensor]:
    """All the numbers a method answers with, for one layer and ordinary options."""
    given = cases.evidence(method.evidence, weight, models=cases.models_of(method))
    return _tensors(method.run(**given, **cases.options(method, weight)))


def _same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Equal bit for bit, where NaN equals NaN: being finite is another law."""
    return len(ours) == len(theirs) and all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and bool(a.isclose(b, rtol=0, atol=0, equal_nan=True).all())
        for a, b in zip(ours, theirs, strict=True)
    )


def _tensors(tree: Any) -> list[Tensor]:
    """Every tensor and number in nested results, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, bool | int | float):
        return [torch.tensor(tree)]
    if isinstance(tree, Mapping):
        return _tensors(list(cast("Mapping[str, Any]", tree).values()))
    if isinstance(tree, list | tuple):
        return [leaf for value in cast("Sequence[Any]", tree) for leaf in _tensors(value)]
    if dataclasses.is_dataclass(tree):
        return [t for f in dataclasses.fields(tree) for t in _tensors(getattr(tree, f.name))]
    return []
