"""What measures of blocks make of tokens and of distributions over the next one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

# One batch of log-probabilities after the other: (windows, length, vocabulary).
Answers = Iterable[Float[Tensor, "_ length vocabulary"]]
# A stream shorter than this has no direction, and nothing is a share of it.
LEAST = 1e-6


def later(
    positions: Int64[Tensor, " tokens"], *parts: Float[Tensor, "tokens width"]
) -> Iterator[Float[Tensor, "kept width"]]:
    """All tokens but the first of each window, which attention makes many times as long."""
    kept = positions > 0
    for part in parts:
        yield part.float()[kept]


def cosine(
    one: Float[Tensor, "tokens width"], other: Float[Tensor, "tokens width"]
) -> Float64[Tensor, " tokens"]:
    """The cosine of each token's two directions; 0 where it lacks one."""
    size = one.double().norm(dim=1).clamp(min=LEAST) * other.double().norm(dim=1).clamp(min=LEAST)
    return (one.double() * other.double()).sum(dim=1).div(size).clamp(-1, 1)


def share(
    one: Float[Tensor, "tokens width"], of: Float[Tensor, "tokens width"]
) -> Float64[Tensor, " tokens"]:
    """How long each token's vector is beside another's."""
    return one.double().norm(dim=1) / of.double().norm(dim=1).clamp(min=LEAST)


def mean(values: Float64[Tensor, " _"]) -> float:
    """Their mean; 0 of none."""
    return float(values.mean()) if len(values) else 0.0


def divergence(
    one: Float[Tensor, "*places vocabulary"], other: Float[Tensor, "*places vocabulary"]
) -> Float64[Tensor, "*places"]:
    """KL(one || other) in nats at each place, of log-probabilities."""
    terms = one.exp() * (one - other)
    # What is impossible for both is no difference.
    return terms.nan_to_num(nan=0.0).sum(dim=-1, dtype=torch.float64).clamp(min=0)


def pairs(
    one: Answers, other: Answers
) -> Iterator[tuple[Float[Tensor, "_ _ _"], Float[Tensor, "_ _ _"]]]:
    """Batches of two models' answers to the same windows."""
    yield from zip(one, other, strict=True)


def centre(values: Sequence[float]) -> float:
    """Where the mass of some numbers, none below 0, lies among their places; 0 of nothing."""
    total = sum(values)
    return sum(place * value for place, value in enumerate(values)) / total if total > 0 else 0.0


def slope(values: Sequence[float]) -> float:
    """How much numbers rise from each to the next, by least squares; 0 of fewer than two."""
    if len(values) < 2:
        return 0.0
    places = torch.arange(len(values)).double() - (len(values) - 1) / 2
    return float(places.dot(torch.tensor(values).double()) / places.square().sum())


def column(records: Sequence[Mapping[str, float]], name: str) -> list[float]:
    """One number of each block's record."""
    return [record[name] for record in records]
