"""What an inspection says, in words: what matters, what can go, which measures agree."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

from layerwise.core.telling.inspection import TRUTH, Inspection
from layerwise.report._words import number, percent, plural

_NAMED = 3  # layers, or measures, that a sentence names
# Two measures that rank layers this much alike say the same; at odds are those below 0.
_ALIKE = 0.9
# What all that can go may bring together, as a share of what all layers bring one by one.
_LITTLE = 0.05


def answers(inspection: Inspection) -> list[str]:
    """Sentences, the most useful first; none where nothing was found out."""
    if not inspection.columns:
        return []
    told = _by_truth(inspection) if inspection.truth else _by_ranks(inspection.scores)
    told += _agreement(inspection)
    told += [f"left out: {name}: {why}" for name, why in inspection.left_out.items()]
    return told


def _by_truth(inspection: Inspection) -> list[str]:
    """Which layers matter, which can go, and what foretells it."""
    truth = inspection.truth
    assert truth is not None
    ranked = sorted(truth.kl, key=lambda layer: -truth.kl[layer])
    whole = sum(truth.kl.values())
    told = [
        f"truth: the KL, in nats per predicted token, that a layer brings when it alone is made "
        f"{truth.done}; {plural(truth.windows, 'window')} of {truth.text}"
    ]
    if not whole > 0:
        return [*told, "no layer matters: none brings any KL"]
    most = [
        f"{layer} ({number(truth.kl[layer])}, {percent(truth.kl[layer] / whole, 2)} of the sum)"
        for layer in ranked[:_NAMED]
    ]
    told.append(f"matters most: {', '.join(most)}")
    told.append(_what_can_go(ranked[::-1], truth.kl, whole))
    return told + _foretold(inspection)


def _what_can_go(ranked: Sequence[str], kl: Mapping[str, float], whole: float) -> str:
    """The layers that bring least, as many as together bring little."""
    gone = together = 0
    for layer in ranked:
        if together + kl[layer] > _LITTLE * whole:
            break
        together += kl[layer]
        gone += 1
    if not gone:
        least = ranked[0]
        share, even = percent(kl[least] / whole, 2), percent(1 / len(ranked), 2)
        return (
            f"none can go at little cost: the cheapest, {least}, brings {share} of the sum, where "
            f"an equal share were {even}"
        )
    more = f" and {gone - _NAMED} more" if gone > _NAMED else ""
    named = ", ".join(ranked[: min(gone, _NAMED)])
    return (
        f"can go: {named}{more}; {plural(gone, 'layer')} of {len(ranked)} that bring "
        f"{percent(together / whole, 2)} of the sum"
    )


def _foretold(inspection: Inspection) -> list[str]:
    """Which measures rank layers as the truth does."""
    found = {
        name: value
        for name, value in inspection.agreement[TRUTH].items()
        if name != TRUTH and value is not None
    }
    if not found:
        return []
    ranked = sorted(found, key=lambda name: -found[name])
    named = ", then ".join(f"{name} ({found[name]:.2f})" for name in ranked[:_NAMED])
    told = [f"foretells the truth best, by rank correlation over layers: {named}"]
    if found[ranked[-1]] < 0:
        last = ranked[-1]
        told.append(f"ranks layers against the truth: {last} ({found[last]:.2f})")
    return told


def _by_ranks(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What measures say of layers without a truth: by the mean of a layer's ranks."""
    ranks = mean_ranks(scores)
    if len(ranks) < 2:
        return []
    ranked = sorted(ranks, key=lambda layer: ranks[layer])
    by = f"the mean of their ranks under {plural(len(scores), 'measure')}"
    return [
        f"matters most by {by}: {', '.join(ranked[:_NAMED])}",
        f"matters least: {', '.join(ranked[: -_NAMED - 1 : -1])}; --truth measures what they bring",
    ]


def mean_ranks(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean rank of each layer, 1 for the most important; equal scores share a rank."""
    placed: dict[str, list[float]] = {}
    for column in scores.values():
        for layer, rank in ranks(column).items():
            placed.setdefault(layer, []).append(rank)
    return {layer: sum(found) / len(found) for layer, found in placed.items()}


def ranks(column: Mapping[str, float]) -> dict[str, float]:
    """The place of each layer, 1 for the highest figure, equal ones at their mean; NaN has none."""
    held = {layer: value for layer, value in column.items() if not math.isnan(value)}
    values = sorted(held.values(), reverse=True)
    first = {value: place for place, value in reversed(list(enumerate(values, 1)))}
    return {layer: first[v] + (values.count(v) - 1) / 2 for layer, v in held.items()}


def _agreement(inspection: Inspection) -> list[str]:
    """Which measures say the same, and which the opposite."""
    pairs = [
        (value, f"{one} and {other} ({value:.2f})")
        for one, other in combinations(inspection.scores, 2)
        if (value := inspection.agreement[one][other]) is not None
    ]
    alike = [words for value, words in sorted(pairs, reverse=True) if value >= _ALIKE]
    odds = [words for value, words in sorted(pairs) if value <= -_ALIKE]
    told: list[str] = []
    for say, found in (("rank layers alike", alike), ("rank them the other way round", odds)):
        if found:
            more = f", and {len(found) - _NAMED} more pairs" if len(found) > _NAMED else ""
            told.append(f"{say}: {'; '.join(found[:_NAMED])}{more}")
    if pairs and not told:
        told.append("no two measures rank layers alike")
    return told
