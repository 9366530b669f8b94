"""Laws of what takes out units."""

from typing import Any

import torch
from torch import Tensor

from layerwise.core.catalogue import Method
from layerwise.core.errors import UserError
from layerwise.core.results import Narrowed
from layerwise.testing import cases

DENSITIES = (0.01, 0.3, 0.75)


def keeps_as_many_units_as_asked(method: Method) -> None:
    """The count is exact, and never 0, for units of one channel and of several."""
    for name, weight in cases.weights().items():
        for units in _counts(weight):
            for density in DENSITIES:
                kept = _narrow(method, weight, density, units).kept
                assert kept.shape == (units,), name
                assert int(kept.sum()) == max(1, round(density * units)), name


def the_highest_scores_stay(method: Method) -> None:
    """No unit that goes has a higher score than one that stays."""
    for name, weight in cases.weights().items():
        for units in _counts(weight):
            cut = _narrow(method, weight, 0.5, units)
            assert cut.scores.shape == (units,), name
            if bool(cut.kept.all()):
                continue
            assert bool(cut.scores[cut.kept].min() >= cut.scores[~cut.kept].max()), name


def scores_do_not_hang_on_the_density(method: Method) -> None:
    """Units of all layers are compared before it is known how many of each stay."""
    for name, weight in cases.weights().items():
        scores = [_narrow(method, weight, d, weight.shape[1]).scores for d in (*DENSITIES, 1.0)]
        assert all(torch.equal(one, scores[0]) for one in scores), name


def full_density_changes_nothing(method: Method) -> None:
    """Where every unit stays, nothing is made up for."""
    for name, weight in cases.weights().items():
        cut = _narrow(method, weight, 1.0, weight.shape[1])
        assert bool(cut.kept.all()), name
        assert not bool(cut.bias.any()), name
        assert cut.weight is None or torch.equal(cut.weight.double(), weight.double()), name


def what_goes_is_not_read(method: Method) -> None:
    """A new weight has the old one's shape, and zeros where units go; a bias is one per output."""
    for name, weight in cases.weights().items():
        for units in _counts(weight):
            cut = _narrow(method, weight, 0.5, units)
            assert cut.bias.shape == weight.shape[:1], name
            if cut.weight is None:
                continue
            gone = ~cut.kept.repeat_interleave(weight.shape[1] // units)
            assert cut.weight.shape == weight.shape, name
            assert not bool(cut.weight[:, gone].any()), name


def the_order_of_units_does_not_matter(method: Method) -> None:
    """Units in another order score the same, each where it is now."""
    weight = cases.weights()["plain"]
    width = weight.shape[1]
    order = torch.randperm(width, generator=torch.Generator().manual_seed(2))
    given = cases.evidence(method.evidence, weight)
    moved = {word: _moved(word, value, order) for word, value in given.items()}
    first = method.run(**given, density=0.5, units=width)
    second = method.run(**moved, density=0.5, units=width)
    assert torch.allclose(first.scores[order], second.scores, rtol=1e-4, atol=1e-5)
    assert torch.equal(first.kept[order], second.kept)
    assert torch.allclose(first.bias, second.bias, rtol=1e-3, atol=1e-3)


def ignores_the_unit_of_the_weights(method: Method) -> None:
    """A layer in smaller units keeps the same ones."""
    for name, given in cases.weights().items():
        weight = given.float()  # whose range has room for both
        units = weight.shape[1]
        kept = _narrow(method, weight, 0.5, units).kept
        assert torch.equal(_narrow(method, weight * 2.0**-20, 0.5, units).kept, kept), name


def what_nobody_reads_goes_first(method: Method) -> None:
    """Channels with columns of zeros are the first to go."""
    weight = cases.weights()["plain"].clone()
    weight[:, 40:80] = 0.0
    kept = _narrow(method, weight, 0.75, weight.shape[1]).kept
    assert not bool(kept[40:80].any())


def refuses_an_impossible_density(method: Method) -> None:
    """A density that is no fraction of the units, or units that are none, are a user's mistake."""
    weight = cases.weights()["plain"]
    for density in (-0.5, 0.0, 1.5, float("nan")):
        assert str(density) in _refusal(method, weight, density, weight.shape[1]), density
    for units in (0, 7):
        assert str(units) in _refusal(method, weight, 0.5, units), units


def _counts(weight: Tensor) -> list[int]:
    """Numbers of units: every channel alone, and runs of some."""
    width = weight.shape[1]
    return [width // each for each in (1, 8) if width % each == 0]


def _moved(word: str, value: Any, order: Tensor) -> Any:
    """Evidence of the same channels in another order."""
    if word == "weight":
        return value[:, order]
    return value[order][:, order] if word == "gram" else value[order]


def _narrow(method: Method, weight: Tensor, density: float, units: int) -> Narrowed:
    given = cases.evidence(method.evidence, weight)
    return method.run(**given, density=density, units=units)


def _refusal(method: Method, weight: Tensor, density: float, units: int) -> str:
    """What the method says to them; nothing if it accepts them."""
    try:
        _narrow(method, weight, density, units)
    except UserError as error:
        return error.problem
    return ""
