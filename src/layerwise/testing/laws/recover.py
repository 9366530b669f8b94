"""Laws of what learns pruned weights anew."""

from collections.abc import Sequence

import torch
from torch import Tensor

from layerwise.core.catalogue import Method
from layerwise.core.errors import UserError
from layerwise.core.learning import Learnable, learn
from layerwise.testing import cases


def begins_as_the_pruned_weight(method: Method) -> None:
    """Before anything is learned, the weight is what the pruner left, bit for bit."""
    for name, weight in cases.weights().items():
        kept = cases.evidence(("kept",), weight)["kept"]
        assert torch.equal(_begun(method, weight).weight(), weight.float().where(kept, 0.0)), name


def what_was_pruned_stays_gone(method: Method) -> None:
    """Wherever parameters are moved to, there is exactly 0.0 outside the mask."""
    noise = torch.Generator().manual_seed(3)
    for name, weight in cases.weights().items():
        kept = cases.evidence(("kept",), weight)["kept"]
        made = _begun(method, weight)
        with torch.no_grad():
            for tensor in _parameters(made):
                tensor.add_(torch.randn(tensor.shape, generator=noise))
            moved = made.weight()
        assert moved.shape == weight.shape, name
        assert bool((moved[~kept] == 0).all()), name


def comes_closer_to_a_weight(method: Method) -> None:
    """Learning moves it towards a weight that is another by half where weights stayed."""
    weight = cases.weights()["plain"]
    kept = cases.evidence(("kept",), weight)["kept"]
    made = _begun(method, weight, steps=40, rate=1e-2)
    rows = torch.linspace(0.5, 1.5, len(weight))[:, None]
    before, after = learn([made], _Distance((weight * rows).where(kept, 0.0)))
    assert after < 0.9 * before


def says_how_it_is_learned(method: Method) -> None:
    """The steps are those that are asked for; every parameter is one that gradients reach."""
    made = _begun(method, cases.weights()["plain"], steps=7)
    assert made.schedule.steps == 7
    assert all(tensor.is_leaf and tensor.requires_grad for tensor in _parameters(made))


def refuses_impossible_numbers(method: Method) -> None:
    """Fewer than no steps, and a rate that is not above 0, are a user's mistake."""
    for name, value in (("steps", -1), ("rate", 0.0), ("rate", float("nan"))):
        assert str(value) in _refusal(method, {name: value}), name


class _Distance:
    """The distance of one weight from another."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def loss(self, weights: Sequence[Tensor], step: int) -> Tensor:
        return (weights[0] - self.target).square().mean()

    def judged(self, weights: Sequence[Tensor]) -> float:
        return float(self.loss(weights, 0))


def _begun(method: Method, weight: Tensor, **options: int | float) -> Learnable:
    return method.run(**cases.evidence(method.evidence, weight), **options)


def _parameters(made: Learnable) -> list[Tensor]:
    return [tensor for tensors in made.parameters().values() for tensor in tensors]


def _refusal(method: Method, given: dict[str, int | float]) -> str:
    """What the method says to some options; nothing if it accepts them."""
    try:
        _begun(method, cases.weights()["plain"], **given)
    except UserError as error:
        return error.problem
    return ""
