"""What a piece of work takes, measured on a smaller one and scaled up."""

import importlib
import os
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

# What torch.profiler is made of; there is no public way to be told of allocations alone.
_torch: Any = importlib.import_module("torch._C")
_profiler, _autograd = _torch._profiler, _torch._autograd
# Short work is timed so often at most, for so many seconds at most.
_TIMES, _LONG = 3, 0.1


@dataclass(frozen=True, slots=True)
class Sample:
    """What some work takes.

    Attributes:
        bytes: Most memory of tensors and arrays that it holds at once, beside what was there.
        seconds: Wall time, on the threads there are.
        held: The most that was held to find this out.
    """

    bytes: int
    seconds: float
    held: int


def sampled(work: Callable[[], object]) -> Sample:
    """Do some work once to count its memory, then a few times to time it."""
    held = _most_held(work)
    taken: list[float] = []
    while len(taken) < _TIMES and sum(taken) < _LONG:
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    # Others at work on the machine only ever make it slower.
    return Sample(held, min(taken), held)


def scaled(work: Callable[[float], Callable[[], object]], sides: Sequence[float]) -> Sample:
    """Foresee work on a matrix from the same work on smaller ones.

    A matrix with both sides x times as long takes memory in proportion to x^2 and less, products
    and factorizations of it time in proportion to x^3 and less.  Three samples say how much of
    which:

        bytes(x)   = a x^2 + b x + c            exactly: counts of bytes do not scatter
        seconds(x) = a x^3 + b x^2 + c x        the closest with no share below zero

    Args:
        work: What gives the work on a matrix with sides so many times as long.
        sides: Those of three samples, the longest first; of one, if that is the matrix itself.
    """
    samples = [sampled(work(side)) for side in sides]
    if len(samples) == 1:
        return samples[0]
    held = np.polynomial.Polynomial.fit(sides, [s.bytes for s in samples], 2, domain=(-1, 1))
    # What grows slowest that can be, and fastest: samples may be too small to say.
    least, most = samples[0].bytes / sides[0], 1.5 * samples[0].bytes / sides[0] ** 2
    return Sample(
        int(min(max(float(held(1.0)), least), most)),
        _seconds(sides, [s.seconds for s in samples]),
        max(s.held for s in samples),
    )


def _seconds(sides: Sequence[float], taken: Sequence[float]) -> float:
    powers = (3, 2, 1)
    # Shares of what was measured, so that the shortest sample counts as much as the longest.
    shares = np.array([[side**p / s for p in powers] for side, s in zip(sides, taken, strict=True)])
    found, _ = nnls(shares, np.ones(len(taken)))
    return float(sum(found))


def _most_held(work: Callable[[], object]) -> int:
    """Bytes of torch, whose profiler tells of each allocation, and of numpy, which Python counts.

    The profiler is asked for nothing else: what it notes of operations takes more than they do.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would print that it begins
    config = _profiler.ProfilerConfig(
        _profiler.ProfilerState.KINETO,
        False,  # shapes
        True,  # memory
        False,  # stacks
        False,  # products
        False,  # modules
        _profiler._ExperimentalConfig(),
    )
    kinds = {_profiler.ProfilerActivity.CPU}
    tracemalloc.start()
    _autograd._prepare_profiler(config, kinds)
    _autograd._enable_profiler(config, kinds, {_profiler.RecordScope.USER_SCOPE})
    try:
        work()
    finally:
        seen = _autograd._disable_profiler()
        _, arrays = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    held = most = 0
    for event in seen.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most + arrays
