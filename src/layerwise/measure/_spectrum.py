"""Eigenvalues of a layer, and the power law that the largest of them follow."""

from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Float64
from scipy.linalg import blas
from torch import Tensor

Start = Literal["ks", "mid", "peak"]

# Below this share of the largest an eigenvalue is what rounding left of 0.
_NOTHING = 1e-10
# Fewer eigenvalues have no tail that could be told from chance.
_FEWEST = 10
# The steepest tail there is: one of equal eigenvalues would be infinitely steep.
_STEEPEST = 100.0
_BINS = 100
_CHUNK = 128  # tails that are compared with their fit at a time


class Tail(NamedTuple):
    """A power law through the largest eigenvalues: their density falls as lambda^-alpha.

    Attributes:
        alpha: The exponent, above 1.
        distance: Kolmogorov-Smirnov distance of the eigenvalues from the law, from 0 to 1.
        start: The smallest eigenvalue of the tail.
        size: How many eigenvalues the tail has; alpha's standard error is
            (alpha - 1) / sqrt(size).
    """

    alpha: float
    distance: float
    start: float
    size: int


def eigenvalues(weight: Float[Tensor, "out in"]) -> Float64[Tensor, " _"]:
    """Those of W^T W that are not 0, ascending: the squares of W's singular values."""
    tall = weight.double() if len(weight) >= weight.shape[1] else weight.double().T
    # To Fortran, whose columns come first, rows of a tensor are columns: half of the product of a
    # matrix with its transpose is all that an eigenvalue needs.
    product = cast(Any, blas).dsyrk(1.0, tall.T.contiguous().numpy().T, trans=1)
    found = torch.linalg.eigvalsh(torch.from_numpy(product), UPLO="U")
    return found[found > _NOTHING * found[-1].clamp(min=0)]


def heaviness(spectrum: Float64[Tensor, " n"], start: Start) -> float:
    """-alpha of the tail, so that higher is heavier; -100 without a tail, or one so steep."""
    tail = fitted(spectrum, start)
    return -_STEEPEST if tail is None else -min(tail.alpha, _STEEPEST)


def fitted(spectrum: Float64[Tensor, " n"], start: Start) -> Tail | None:
    """The likeliest power law of a spectrum's tail.

    For the tail that starts at eigenvalue i of n, ascending:

        alpha_i = 1 + (n - i) / sum_{j >= i} ln(lambda_j / lambda_i)
        D_i     = max_{j >= i} | 1 - (lambda_j / lambda_i)^(1 - alpha_i) - (j - i) / (n - i) |

    Args:
        spectrum: Positive, ascending.
        start: Where the tail starts: "ks" wherever D is least; "mid" at the median; "peak" where D
            is least between 0.95 and 1.5 times the most frequent eigenvalue, in 100 bins of their
            logarithms.

    Returns:
        The tail; None if there are fewer than 10 eigenvalues, or all of the tail are equal.
    """
    if len(spectrum) < _FEWEST:
        return None
    logs, left = spectrum.log(), torch.arange(len(spectrum), 0, -1)  # (n,), in the tail of each
    above = (logs - logs[0]).flip(0).cumsum(dim=0).flip(0) - left * (logs - logs[0])
    # What is left between equal eigenvalues is rounding.
    slopes = left / above.clamp(min=0)  # (n,), alpha - 1
    allowed = _starts(logs, start) & slopes.isfinite()
    allowed[-1] = False
    if not allowed.any():
        return None
    places = allowed.nonzero().flatten()  # (starts,)
    distances = torch.cat([_distances(logs, slopes, part) for part in places.split(_CHUNK)])
    best = int(distances.argmin())
    place = int(places[best])
    return Tail(
        1 + float(slopes[place]), float(distances[best]), float(spectrum[place]), int(left[place])
    )


def _starts(logs: Float64[Tensor, " n"], start: Start) -> Bool[Tensor, " n"]:
    """Eigenvalues that a tail may start at."""
    if start == "ks":
        return torch.ones(len(logs), dtype=torch.bool)
    if start == "mid":
        return torch.arange(len(logs)) == len(logs) // 2
    counts, edges = torch.histogram(logs, _BINS)
    mode = edges[int(counts.argmax())]
    # Rounding may set the edge of the first bin above what lies on it.
    first = torch.arange(len(logs)) == (logs < mode - 1e-9).sum()
    factors = torch.tensor([0.95, 1.5], dtype=torch.float64).log()
    return first | ((logs >= mode + factors[0]) & (logs <= mode + factors[1]))


def _distances(
    logs: Float64[Tensor, " n"], slopes: Float64[Tensor, " n"], places: Tensor
) -> Float64[Tensor, " starts"]:
    """How far the tails that start at some places lie from their power laws."""
    first, size = int(places[0]), len(logs)
    ranks = torch.arange(first, size) - places[:, None]  # (starts, rest)
    expected = (-slopes[places, None] * (logs[first:] - logs[places, None])).exp()
    apart = (1 - expected - ranks / (size - places[:, None])).abs()
    return apart.masked_fill(ranks < 0, 0.0).amax(dim=1)
