"""Laws of allocators."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from layerwise.core.catalogue import Method
from layerwise.core.errors import UserError
from layerwise.testing import cases


def chooses_levels_that_exist(method: Method) -> None:
    """Every item gets the index of one of its levels."""
    for given, budget in _instances(method):
        levels = method.run(**given, budget=budget)
        assert levels.shape == (len(_costs(given)),)
        assert not levels.is_floating_point()
        assert all(
            0 <= int(level) < len(cost) for level, cost in zip(levels, _costs(given), strict=True)
        )


def never_over_budget(method: Method) -> None:
    """What is chosen never costs more than the budget, not by one."""
    for given, budget in _instances(method):
        assert _spent(given, method.run(**given, budget=budget)) <= budget


def leaves_no_whole_level_unspent(method: Method) -> None:
    """What is left over does not pay for one level more of every item that has one."""
    for given, budget in _instances(method):
        levels = method.run(**given, budget=budget)
        higher = torch.tensor(
            [
                min(int(level) + 1, len(cost) - 1)
                for level, cost in zip(levels, _costs(given), strict=True)
            ]
        )
        assert torch.equal(higher, levels) or _spent(given, higher) > budget


def ignores_the_order_of_items(method: Method) -> None:
    """Listing items in another order gives each of them the same level."""
    order = [2, 0, 3, 1]
    for given, budget in _instances(method, names=("plain",)):
        moved = {word: _reorder(value, order) for word, value in given.items()}
        levels = method.run(**given, budget=budget)
        assert torch.equal(method.run(**moved, budget=budget), levels[order])


def ignores_the_unit_of_its_evidence(method: Method) -> None:
    """Errors, scores and weights in other units lead to the same levels."""
    for factor in (2.0**-30, 2.0**20):
        for given, budget in _instances(method, names=("plain", "outlier")):
            scaled = {
                word: value if word in ("costs", "shapes") else _scale(value, factor)
                for word, value in given.items()
            }
            levels = method.run(**given, budget=budget)
            assert torch.equal(method.run(**scaled, budget=budget), levels)


def a_higher_score_never_gets_less(method: Method) -> None:
    """Of items that cost the same, the more important one has at least the level of the other."""
    if "scores" not in method.evidence:
        return
    for given, _ in _instances(method, names=("plain",)):
        same = [_costs(given)[0]] * len(_costs(given))
        order = given["scores"].argsort()
        for budget in _budgets(same):
            levels = method.run(**{**given, "costs": same}, budget=budget)[order]
            assert torch.equal(levels, levels.sort().values)


def errs_no_more_than_one_level_for_all(method: Method) -> None:
    """A method that knows the errors does at least as well as the highest common level."""
    if "errors" not in method.evidence:
        return
    for given, budget in _instances(method):
        levels = method.run(**given, budget=budget)
        for common in range(max(len(cost) for cost in _costs(given))):
            uniform = torch.tensor([min(common, len(cost) - 1) for cost in _costs(given)])
            if _spent(given, uniform) <= budget:
                assert _error(given, levels) <= _error(given, uniform) * (1 + 1e-9)


def lowers_none_for_more(method: Method) -> None:
    """What is declared nested is: no item gets a lower level for a larger budget."""
    if not method.nested:
        return
    for name in cases.weights():
        plans = [
            method.run(**given, budget=budget) for given, budget in _instances(method, (name,))
        ]
        assert all(bool((more >= less).all()) for less, more in itertools.pairwise(plans))


def refuses_the_impossible(method: Method) -> None:
    """A budget below the least plan is the user's mistake; the refusal names both."""
    given = dict(cases.evidence(method.evidence, cases.weights()["plain"]))
    least = _budgets(_costs(given))[0]
    refusal = ""
    try:
        method.run(**given, budget=least - 1)
    except UserError as error:
        refusal = error.problem
    assert str(least - 1) in refusal
    assert str(least) in refusal


def _instances(method: Method, names: tuple[str, ...] = ()) -> Iterator[tuple[dict[str, Any], int]]:
    """Evidence and a budget: from the least plan to more than everything."""
    for name, weight in cases.weights().items():
        if name in (names or cases.weights()):
            given = dict(cases.evidence(method.evidence, weight))
            for budget in _budgets(_costs(given)):
                yield given, budget


def _costs(given: dict[str, Any]) -> list[Tensor]:
    return list(given["costs"])


def _budgets(costs: list[Tensor]) -> list[int]:
    least, most = (sum(int(cost[end]) for cost in costs) for end in (0, -1))
    inside = [least + (most - least) * tenth // 10 + 1 for tenth in range(10)]
    return [least, *inside, most, most + 1]


def _spent(given: dict[str, Any], levels: Tensor) -> int:
    return sum(int(cost[int(level)]) for cost, level in zip(_costs(given), levels, strict=True))


def _error(given: dict[str, Any], levels: Tensor) -> float:
    return sum(
        float(error[int(level)]) for error, level in zip(given["errors"], levels, strict=True)
    )


def _reorder(value: Any, order: list[int]) -> Any:
    return value[order] if isinstance(value, Tensor) else [value[item] for item in order]


def _scale(value: Any, factor: float) -> Any:
    return value * factor if isinstance(value, Tensor) else [part * factor for part in value]
