"""Whether a value that a person wrote fits where it is to go."""

import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value, as YAML or Python gives it, is of an annotated type.

    A whole number will do for a fraction (YAML writes 1.0 as 1), and true for no number.
    """
    if get_origin(kind) is not None:
        return _fits_parts(value, get_origin(kind), get_args(kind))
    if kind is Any or isinstance(value, bool):
        return kind in (Any, bool)
    if kind is float:
        return isinstance(value, int | float)
    return value is None if kind is type(None) else isinstance(value, kind)


def _fits_parts(value: Any, origin: Any, inner: Sequence[Any]) -> bool:
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin in (Mapping, dict):
        return isinstance(value, Mapping) and all(
            fits(key, inner[0]) and fits(one, inner[1]) for key, one in value.items()
        )
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    return listed and all(fits(one, inner[0]) for one in value)


def described(kind: Any) -> str:
    """An annotated type in words, for a message."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(described(one) for one in inner)
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin in (Sequence, list, tuple):
        return f"a list, each {described(inner[0])}"
    if origin in (Mapping, dict):
        return "a mapping"
    if kind is type(None):
        return "nothing (null)"
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind)))
