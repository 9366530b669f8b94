"""Numbers that look random and depend on nothing but where they stand."""

import hashlib

from jaxtyping import Float, Int64
from torch import Tensor

# Odd multipliers and shifts of the finalizer splitmix64 (Steele, Lea and Flood, 2014).
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = 1 << 64


def uniform(entries: Int64[Tensor, "*shape"], key: int, seed: int) -> Float[Tensor, "*shape"]:
    """One number in [0, 1) for each entry, a multiple of 2^-24: the same in any slice of a tensor.

    Args:
        entries: Where in its tensor each entry lies.
        key: Which tensor it is.
        seed: Another one gives other numbers.
    """
    start = _mixed_one((key ^ _mixed_one(seed % _WORD)) % _WORD)
    state = entries * _signed(_STEP) + _signed(start)
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        state = (state ^ _shifted(state, shift)) * _signed(factor)
    state = state ^ _shifted(state, 31)
    return _shifted(state, 40).float() * 2.0**-24


def key_of(*parts: str) -> int:
    """A number for some words, below 2^63."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "little") >> 1


def _shifted(state: Tensor, by: int) -> Tensor:
    """To the right, with zeros coming in from the left."""
    return (state >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word


def _mixed_one(word: int) -> int:
    word = (word + _STEP) % _WORD
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        word = (word ^ word >> shift) * factor % _WORD
    return word ^ word >> 31
