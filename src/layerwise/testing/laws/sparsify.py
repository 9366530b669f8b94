"""Laws of sparsifiers."""

import itertools
from typing import Any

import torch
from torch import Tensor

from layerwise.core.catalogue import Method
from layerwise.core.errors import UserError
from layerwise.testing import cases

DENSITIES = (0.1, 0.5, 0.75)
# Evidence in a unit of its own, and evidence whose first axis holds what came together.
_UNITS = ("activations", "columns", "queries", "keys", "scores")
_TOGETHER = ("activations", "queries", "keys", "attentions")
# Evidence, and the entry along its last axis that the law makes zero.
_DEAD = {"activations": 17, "keys": 7}


def keeps_the_asked_density(method: Method) -> None:
    """Of what each token, head or picture has, that fraction is kept to within one."""
    for name, weight in cases.weights().items():
        for density in DENSITIES:
            kept = _run(method, weight, density)
            assert kept.dtype == torch.bool, name
            asked = density * kept.shape[-1]
            counts = kept.sum(dim=-1)
            assert bool(((counts - asked).abs() <= 1).all()), name
            assert bool((counts >= 1).all()), name


def full_density_keeps_everything(method: Method) -> None:
    """At density 1 nothing is left out."""
    for name, weight in cases.weights().items():
        assert bool(_run(method, weight, 1.0).all()), name


def a_higher_density_keeps_what_a_lower_one_does(method: Method) -> None:
    """What is worth keeping of little is worth keeping of more."""
    for name, weight in cases.weights().items():
        masks = [_run(method, weight, density) for density in DENSITIES]
        for lower, higher in itertools.pairwise(masks):
            assert bool((higher | ~lower).all()), name


def ignores_the_unit_of_its_evidence(method: Method) -> None:
    """Evidence in smaller units keeps the same."""
    for name, weight in cases.weights().items():
        given = _given(method, weight)
        smaller = {
            word: value * 2.0**-10 if word in _UNITS else value for word, value in given.items()
        }
        kept = method.run(**given, density=0.5)
        assert torch.equal(method.run(**smaller, density=0.5), kept), name


def what_is_always_zero_goes_first(method: Method) -> None:
    """An input or a channel that is zero adds nothing, and is not kept."""
    given = _given(method, cases.weights()["plain"])
    # Tokens are kept, of which the channels of keys are only a description.
    words = [word for word in _DEAD if word in given and "attentions" not in given]
    for word in words:
        given[word] = given[word].clone()
        given[word][..., _DEAD[word]] = 0.0
        kept = method.run(**given, density=0.5)
        assert not bool(kept[..., _DEAD[word]].any()), word


def what_comes_together_is_judged_alone(method: Method) -> None:
    """A token, text or picture keeps the same whatever is beside it in a batch."""
    for name, weight in cases.weights().items():
        given = _given(method, weight)
        if not given.keys() & set(_TOGETHER):
            return
        alone = {word: value[:1] if word in _TOGETHER else value for word, value in given.items()}
        kept = method.run(**given, density=0.5)
        assert torch.equal(method.run(**alone, density=0.5), kept[:1]), name


def refuses_an_impossible_density(method: Method) -> None:
    """A density that is no fraction is the user's mistake."""
    for density in (-0.5, 0.0, 1.5, float("nan")):
        assert str(density) in _refusal(method, density), density


def _given(method: Method, weight: Tensor) -> dict[str, Any]:
    return dict(cases.evidence(method.evidence, weight))


def _run(method: Method, weight: Tensor, density: float) -> Tensor:
    return method.run(**_given(method, weight), density=density)


def _refusal(method: Method, density: float) -> str:
    """What the method says to that density; nothing if it accepts it."""
    try:
        _run(method, cases.weights()["plain"], density)
    except UserError as error:
        return error.problem
    return ""
