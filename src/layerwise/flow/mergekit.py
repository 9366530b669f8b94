"""mergekit's YAML recipes, read as merges of ours.

What a recipe says and how it is looked up follows mergekit's `config.py` and `plan.py` (June 2026):
a parameter of a model in a slice, of the slice, then of the recipe; lists are interpolated over the
layers of a slice; of filters the first that occurs in the tensor's name counts; tensors outside the
layers are at the beginning of lists.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerwise.core.errors import UserError
from layerwise.core.merging.blend import Blend, Setting, at
from layerwise.core.reading.assembled import Assembled, Piece
from layerwise.core.reading.checkpoint import Source, open_source
from layerwise.core.reading.families import HEADS
from layerwise.core.reading.structure import block_of, embeds
from layerwise.core.written import fits, read_yaml
from layerwise.flow.merging import FLOATS, Wanted

KEY = "merge_method"  # what only such a recipe has
_ENTRIES = (
    *("merge_method", "models", "slices", "base_model", "dtype", "out_dtype", "parameters"),
    "tokenizer_source",
)
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
# No result depends on it: mergekit keeps masks in it.
_WITHOUT_EFFECT = frozenset({"int8_mask"})


@dataclass(frozen=True, slots=True)
class _Method:
    """What one of mergekit's methods is here.

    Attributes:
        ours: Name of our method.
        each: Parameters of each model, with their defaults; None must be given.
        all: Those of all models together, with what they are called here.
        fixed: Options that its rule implies.
    """

    ours: str
    each: Mapping[str, float | None]
    all: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, Any]


_SUM = {"lambda": ("scale", 1.0), "normalize": ("normalize", False)}
_METHODS = {
    "linear": _Method("linear", {"weight": None}, {"normalize": ("normalize", True)}, {}),
    "slerp": _Method("slerp", {}, {"t": ("t", None)}, {}),
    "passthrough": _Method("linear", {}, {}, {}),
    "task_arithmetic": _Method("task_arithmetic", {"weight": None}, _SUM, {}),
    "ties": _Method(
        "ties",
        {"weight": None, "density": 1.0},
        _SUM | {"normalize": ("normalize", True)},
        {"scope": "tensor"},
    ),
    "dare_linear": _Method(
        "dare", {"weight": None, "density": 1.0}, _SUM | {"rescale": ("rescale", True)}, {}
    ),
    "dare_ties": _Method(
        "dare_ties", {"weight": None, "density": 1.0}, _SUM | {"rescale": ("rescale", True)}, {}
    ),
}


@dataclass(frozen=True, slots=True)
class Translated:
    """A recipe as a merge of ours."""

    models: Sequence[Source]
    base: Source | None
    wanted: Wanted


@dataclass(frozen=True, slots=True)
class _Slice:
    """Layers of the result: which of each model, and what is said of them."""

    sources: Sequence[Mapping[str, Any]]
    ranges: Sequence[tuple[int, int]]
    parameters: Mapping[str, Any]

    @property
    def layers(self) -> int:
        """How many there are."""
        return self.ranges[0][1] - self.ranges[0][0]


def translate(file: Path, wanted: Wanted) -> Translated:
    """Read a recipe of mergekit's.

    Args:
        file: The recipe.
        wanted: What the recipe does not say: texts and the like.

    Raises:
        UserError: It holds what is not understood; the message names it.
    """
    content = read_yaml(file, "recipe", "mergekit's documentation describes them.")
    if not isinstance(content, dict):
        raise UserError(f"{file} is no recipe.", f"Understood are {', '.join(_ENTRIES)}.")
    if unknown := [name for name in content if name not in _ENTRIES]:
        raise UserError(
            f"{file}: {unknown[0]} is not understood.", f"Understood are {', '.join(_ENTRIES)}."
        )
    name = str(content.get(KEY))
    if name not in _METHODS:
        raise UserError(
            f"{file}: merge_method {name} is not understood.",
            f"Understood are {', '.join(_METHODS)}.",
        )
    method = _METHODS[name]
    dtype = _dtype(file, content)
    opened: dict[str, Source] = {}
    base_name = content.get("base_model")
    slices = _slices(file, content, opened)
    if base_name is not None:
        _open(file, base_name, opened)
    for one in slices:
        _check_parameters(file, name, method, one)
    _check_names(file, name, method, content.get("parameters") or {}, "parameters")
    tied = method.ours not in ("linear", "slerp")
    if (tied or name == "slerp") and base_name is None:
        raise UserError(f"{file}: {name} lacks base_model.", "Add base_model: PATH.")
    members = [path for path in opened if not (tied and path == base_name)]
    if (
        base_name is not None
        and not tied
        and name != "slerp"
        and not any(source["model"] == base_name for one in slices for source in one.sources)
    ):
        members.remove(base_name)
    sliced = "slices" in content
    sources = {path: _assembled(opened[path], path, slices, sliced) for path in opened}
    found = [sources[path] for path in members]
    align = _aligns(file, content, members, tied)
    settings = _settings(file, name, method, content, slices, members, sources)
    return Translated(
        found,
        sources[str(base_name)] if tied and base_name is not None else None,
        replace(
            wanted,
            blend=Blend(method.ours, settings),
            dtype=dtype,
            align=align,
            missing="keep" if sliced else wanted.missing,
            sliced=sliced,
        ),
    )


def _slices(file: Path, content: Mapping[str, Any], opened: dict[str, Source]) -> list[_Slice]:
    models, slices = content.get("models"), content.get("slices")
    if bool(models) == bool(slices):
        raise UserError(f"{file} must have either models or slices.", "Give one of them.")
    listed: Any = slices or [{"sources": models}]
    made: list[_Slice] = []
    for one in listed:
        sources: Any = one.get("sources") if isinstance(one, dict) else None
        if not fits(sources, Sequence[Mapping[str, Any]]):
            raise UserError(f"{file}: {one!r} is no slice.", "Write sources: [{model: PATH}].")
        if unknown := one.keys() - {"sources", "parameters"}:
            raise UserError(f"{file}: {sorted(map(str, unknown))[0]} of a slice is not understood.",
                            "Understood are sources and parameters.")  # fmt: skip
        ranges: list[tuple[int, int]] = []
        for source in sources:
            if unknown := source.keys() - {"model", "parameters", "layer_range"}:
                raise UserError(
                    f"{file}: {sorted(map(str, unknown))[0]} of a model is not understood.",
                    "Understood are model, parameters and layer_range.",
                )
            model = _open(file, source.get("model"), opened)
            held = len(_layers(model))
            asked = source.get("layer_range") or [0, held]
            if not fits(asked, Sequence[int]) or len(asked) != 2:
                raise UserError(
                    f"{file}: layer_range {asked!r} is not understood.", "Write [0, 8]."
                )
            first, last = asked
            if not 0 <= first < last <= held:
                raise UserError(
                    f"{file}: layer_range [{first}, {last}] is not in {model.label}, which has "
                    f"{held} layers.",
                    "The last number is the first layer that is left out.",
                )
            ranges.append((first, last))
        if len({last - first for first, last in ranges}) > 1:
            raise UserError(
                f"{file}: the models of a slice have different numbers of layers: {ranges}.",
                "Give ranges of one length.",
            )
        made.append(_Slice(sources, ranges, one.get("parameters") or {}))
    return made


def _open(file: Path, name: Any, opened: dict[str, Source]) -> Source:
    if not isinstance(name, str):
        raise UserError(f"{file}: {name!r} is no model.", "Write its path or hub id.")
    if name not in opened:
        opened[name] = open_source(name)
    return opened[name]


def _stack(source: Source) -> str:
    """What the names of a model's layers begin with."""
    found: dict[str, int] = {}
    for tensor in source.tensors:
        stack = block_of(tensor).rpartition(".")[0]
        found[stack] = found.get(stack, 0) + bool(stack)
    return max(found, key=found.__getitem__, default="")


def _layers(source: Source) -> list[int]:
    stack = _stack(source)
    pattern = re.compile(rf"{re.escape(stack)}\.(\d+)\.")
    numbers = {int(found[1]) for name in source.tensors if (found := pattern.match(name))}
    return sorted(numbers)


def _assembled(source: Source, path: str, slices: Sequence[_Slice], sliced: bool) -> Source:
    """A model as the slices take it: layers under their new numbers, and what is around them."""
    if not sliced:
        return source
    stack, pieces, number = _stack(source), dict[str, Piece](), 0
    around = [name for name in source.tensors if not name.startswith(f"{stack}.")]
    before = [name for name in around if _comes_first(name)]
    after = [name for name in around if name not in before]
    taken: list[int] = []
    for one in slices:
        part = [
            rng for src, rng in zip(one.sources, one.ranges, strict=True) if src["model"] == path
        ]
        if len(part) > 1:
            raise UserError(
                f"a slice takes {source.label} twice.", "Give each model once in a slice."
            )
        for offset in range(one.layers):
            if part:
                old = part[0][0] + offset
                taken.append(old)
                for name in source.tensors:
                    if name.startswith(f"{stack}.{old}."):
                        new = f"{stack}.{number}." + name.removeprefix(f"{stack}.{old}.")
                        pieces[new] = Piece(source, name)
            number += 1
    first, last = ([src["model"] for src in one.sources] for one in (slices[0], slices[-1]))
    whole = not any(path == src["model"] for one in slices for src in one.sources)
    outer = before * (path in first or whole) + after * (path in last or whole)
    pieces |= {name: Piece(source, name) for name in outer}
    if whole:  # a base that is in no slice takes part in all layers
        pieces |= {name: Piece(source, name) for name in source.tensors if name.startswith(stack)}
    held, config = len(_layers(source)), dict(source.config)
    counts = {name: number for name in _LAYERS if name in config}
    # Lists with an entry for each layer, such as the kinds of attention.
    lists = {
        name: [value[place % held] for place in taken]
        for name, value in config.items()
        if isinstance(value, list) and len(value) == held and len(taken) == number
    }
    return Assembled(source.label, pieces, config | counts | lists, source.companions)


def _comes_first(name: str) -> bool:
    word = name.removesuffix(".weight").rpartition(".")[2]
    return word not in HEADS and (embeds(word) or word in ("wte", "wpe"))


def _settings(
    file: Path,
    name: str,
    method: _Method,
    content: Mapping[str, Any],
    slices: Sequence[_Slice],
    members: Sequence[str],
    sources: Mapping[str, Source],
) -> dict[str, Setting]:
    general = content.get("parameters") or {}
    base = content.get("base_model")
    tensors = list(dict.fromkeys(tensor for one in sources.values() for tensor in one.tensors))
    starts = [sum(one.layers for one in slices[:n]) for n in range(len(slices))]
    settings: dict[str, Setting] = {}
    for tensor in tensors:
        stack, _, number = block_of(tensor).rpartition(".")
        depth, here = 0.0, slices[0] if _comes_first(tensor) else slices[-1]
        if stack == _stack(next(iter(sources.values()))) and number:
            n = max(k for k, start in enumerate(starts) if start <= int(number))
            here = slices[n]
            place = int(number) - starts[n]
            depth = place / (here.layers - 1) if here.layers > 1 else 1.0
        look = _lookup(tensor, depth, here, general)
        named = {source["model"] for source in here.sources}
        options = dict(method.fixed)
        for theirs, (ours, default) in method.all.items():
            value = look(theirs, None)
            options[ours] = default if value is None else value
        if name == "slerp":
            t = options.pop("t")
            if t is None:
                raise UserError(f"{file}: slerp lacks t for {tensor}.", "Add it to parameters.")
            shares = [float(1 - t if path == base else t) for path in members]
        elif name == "passthrough":
            shares = [float(path in named) for path in members]
        else:
            shares = [_given(file, tensor, path, look, named) for path in members]
        if "density" in method.each:
            found = [look("density", path) for path in members]
            listed = [1.0 if one is None else float(one) for one in found]
            options["density"] = listed[0] if len(set(listed)) == 1 else listed
        settings[tensor] = Setting(shares, options)
    return settings


def _given(
    file: Path, tensor: str, path: str, look: Callable[[str, str | None], Any], named: set[Any]
) -> float:
    if path not in named:
        return 0.0
    value = look("weight", path)
    if value is None:
        raise UserError(
            f"{file}: {path} lacks a weight for {tensor}.", "Add weight to its parameters."
        )
    return float(value)


def _lookup(
    tensor: str, depth: float, here: _Slice, general: Mapping[str, Any]
) -> Callable[[str, str | None], Any]:
    """What looks a parameter up: of a model in its slice, of the slice, of the recipe."""

    def look(name: str, model: str | None) -> Any:
        own = [one.get("parameters") or {} for one in here.sources if one["model"] == model]
        for place in (*own, here.parameters, general):
            if name in place:
                value = _value(tensor, place[name], depth)
                if value is not None:
                    return value
        return None

    return look


def _value(tensor: str, setting: Any, depth: float) -> Any:
    """A parameter for one tensor: a number, a list over depth, or the first filter that fits."""
    if isinstance(setting, list):
        if fits(setting, Sequence[float]):
            return at([float(one) for one in setting], depth)
        for one in setting:
            wanted = one.get("filter")
            if wanted in (None, "*") or wanted in tensor:
                return _value(tensor, one.get("value"), depth)
        return None
    return _value(tensor, [setting], depth) if isinstance(setting, Mapping) else setting


def _check_parameters(file: Path, name: str, method: _Method, one: _Slice) -> None:
    _check_names(file, name, method, one.parameters, "the parameters of a slice")
    for source in one.sources:
        given = source.get("parameters") or {}
        _check_names(file, name, method, given, f"the parameters of {source['model']}")


def _check_names(file: Path, name: str, method: _Method, given: Any, where: str) -> None:
    known = {*method.each, *method.all, *_WITHOUT_EFFECT}
    if method.ours in ("task_arithmetic", "ties"):
        known |= {"density", "rescale"}  # task arithmetic passes over both, TIES over a true one
    if not isinstance(given, Mapping):
        raise UserError(f"{file}: {where} are {given!r}.", "Write NAME: VALUE.")
    for parameter, value in given.items():
        if parameter not in known or (name == "ties" and parameter == "rescale" and value):
            raise UserError(
                f"{file}: {parameter} in {where} is not understood for {name}.",
                f"Understood are {', '.join(sorted(known))}.",
            )
        _check_value(file, parameter, value)


def _check_value(file: Path, parameter: str, value: Any) -> None:
    numbers = float | bool | Sequence[float]
    listed = value if isinstance(value, list) else [value]
    by_filter = [one for one in listed if isinstance(one, Mapping)]
    right = fits(value, numbers) and value != []
    if by_filter:
        right = by_filter == listed and all(
            not one.keys() - {"filter", "value"}
            and isinstance(one.get("filter"), str | None)
            and fits(one.get("value"), numbers)
            and one.get("value") != []
            for one in by_filter
        )
    if not right:
        raise UserError(
            f"{file}: {parameter}: {value!r} is not understood.",
            "Write a number, a list of numbers, or entries with filter and value.",
        )


def _dtype(file: Path, content: Mapping[str, Any]) -> str:
    name = content.get("out_dtype") or content.get("dtype") or ""
    if name and str(name) not in FLOATS:
        raise UserError(f"{file}: dtype {name} is not understood.", f"Write {', '.join(FLOATS)}.")
    return name


def _aligns(file: Path, content: Mapping[str, Any], members: Sequence[str], tied: bool) -> bool:
    wanted = content.get("tokenizer_source")
    if wanted is None:
        return False
    holder = content.get("base_model") if tied else members[0]
    if wanted == holder or (wanted == "base" and holder == content.get("base_model")):
        return True
    raise UserError(
        f"{file}: tokenizer_source {wanted} is not understood.",
        f"The tokenizer of {holder} can be that of the result"
        + (": write base." if tied else ", as the first model's; list another one first."),
    )
