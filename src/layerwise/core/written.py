"""What people write, and what we wrote: whether a value fits where it is to go."""

import dataclasses
import json
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from layerwise.core.errors import UserError

Record = TypeVar("Record")

# Deeper than people write, and less deep than Python can go; entries that merges of YAML may make.
_DEEPEST, _MOST_MERGED = 100, 10_000
# Entries that a file may have once what it says by reference is written out.
_MOST_ENTRIES = 2_000_000
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


def check_types(where: str, given: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Refuse entries that are not of their annotated types.

    Args:
        where: Whose entries they are, for the message.
        given: The entries; each has a kind.
        kinds: An annotation for each name.

    Raises:
        UserError: It names the entry and what may stand there.
    """
    for name, value in given.items():
        if not fits(value, kinds[name]):
            raise UserError(f"{where} has {name}: {value!r}.", f"Write {described(kinds[name])}.")


def rebuilt(kind: type[Record], content: Any, where: str) -> Record:
    """A dataclass from what JSON kept of it, its dataclasses inside included.

    A field that is not there has its default; a name that is no field is passed over, since a
    later version may have written it.

    Args:
        kind: The dataclass.
        content: Its fields by name.
        where: Where they stand, for the message.

    Raises:
        UserError: A field without a default is not there, or one holds what it cannot hold.
    """
    return _rebuilt(kind, content, where)


def _rebuilt(kind: Any, value: Any, where: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType) and value is not None:
        kind = next(filter(dataclasses.is_dataclass, inner), kind)
    if origin is Sequence and isinstance(value, list | tuple):
        return tuple(_rebuilt(inner[0], one, f"{where}[{n}]") for n, one in enumerate(value))
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        made: Any = kind
        return made(**_parts(kind, value, where))
    if not fits(value, kind):
        raise UserError(
            f"{where} is {value!r}, not {described(kind)}.", "Give a file as layerwise wrote it."
        )
    fraction = float in (kind, *inner) and int not in inner
    return float(value) if fraction and isinstance(value, int) else value


def _parts(kind: Any, value: Mapping[str, Any], where: str) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name in value:
            inside = get_type_hints(kind)[field.name]
            parts[field.name] = _rebuilt(inside, value[field.name], f"{where}: {field.name}")
        elif field.default is field.default_factory:  # both are MISSING
            raise UserError(f"{where} lacks {field.name!r}.", "Give a file as layerwise wrote it.")
    return parts


def read_yaml(file: Path, kind: str, maker: str) -> Any:
    """What a YAML file holds: plain data, no key twice.

    Args:
        file: The file.
        kind: What it should be, in a word.
        maker: What writes one, as a sentence.

    Raises:
        UserError: It is not there, may not be read, or is not YAML.
    """
    try:
        # Built on SafeLoader: it makes plain data only.
        content = yaml.load(file.read_text(), _Loader)
        _check_entries(content)
    except FileNotFoundError:
        raise UserError(f"there is no {kind} {file}.", maker) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}", f"Give a {kind}'s YAML file.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not YAML: {error}", "Correct that line.") from error
    return content


def parse_json(text: str | bytes) -> Any:
    """What a JSON document holds.

    Raises:
        ValueError: It is none, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _check_entries(content: Any) -> None:
    """Refuse data of few lines that would take all memory written out, as messages do."""
    ahead, count = [content], 0
    while ahead:
        one = ahead.pop()
        inside = one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        ahead.extend(inside)
        count += len(inside)
        if count > _MOST_ENTRIES:
            raise ValueError(f"it stands for more than {_MOST_ENTRIES:,} entries")


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would keep the last, and what is no data.

    That is nesting and merging beyond what people write.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A node of a document, none too deep inside."""
        if self.depth > _DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(None, None, "it is nested too deeply", mark)
        self.depth += 1
        found = super().compose_node(parent, index)
        self.depth -= 1
        return found

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Write out what a mapping takes over from others."""
        before = len(node.value)
        super().flatten_mapping(node)
        if len(node.value) > max(before, _MOST_MERGED):
            raise yaml.constructor.ConstructorError(
                None, None, "it merges too many entries", node.start_mark
            )

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are all different."""
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} stands there twice", key.start_mark
                )
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return super().construct_mapping(node, deep)


UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def bytes_of(text: str) -> int:
    """A size in bytes, as people write it: 900MiB, 1.2GB.

    Raises:
        UserError: It is not written as one.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMG]?i?B)\s*", text)
    if not match or match[2] not in UNITS:
        raise UserError(f"{text!r} is not a size.", f"Write 1.2GiB ({', '.join(UNITS)}).")
    return int(float(match[1]) * UNITS[match[2]])
