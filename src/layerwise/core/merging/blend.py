"""How models are merged, tensor by tensor: a YAML file a person can read and edit."""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from layerwise.core import catalogue
from layerwise.core.errors import UserError
from layerwise.core.reading.families import HEADS
from layerwise.core.reading.structure import block_of, embeds
from layerwise.core.written import described, fits, read_yaml

# A number for every tensor, or one for each of several depths with straight lines between them.
Curve = float | Sequence[float]
_FIELDS = ("method", "models", "base", "dtype", "tensors")
_KNOWN = f"Known: {', '.join(_FIELDS)}."


@dataclass(frozen=True, slots=True)
class Setting:
    """How one tensor is merged.

    Attributes:
        shares: How much each model counts, in the order in which the models are given.
        options: Options of the method; a list has a value for each model.
    """

    shares: Sequence[float]
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Blend:
    """How every tensor is merged, and by what.

    Attributes:
        method: Name of the method.
        settings: By tensor.
    """

    method: str
    settings: Mapping[str, Setting]

    @property
    def merger(self) -> catalogue.Method:
        """The method."""
        return catalogue.get(f"merge/{self.method}")


@dataclass(frozen=True, slots=True)
class Rule:
    """What holds for some tensors; what is not said is as the rule `*` says, or the default.

    Attributes:
        weights: For each model a number, or a curve over depth.
        options: Options of the method: values, `{curve: [...]}`, or lists with one for each model.
    """

    weights: Sequence[Curve] | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


def lay_out(method: str, rules: Mapping[str, Rule], names: Sequence[str], models: int) -> Blend:
    """Lay patterns over the tensors of a model.

    Args:
        method: Name of the method.
        rules: By pattern; `*` holds where no other does, and an exact name wins over a pattern.
        names: The tensors, in order.
        models: How many models there are.

    Raises:
        UserError: A pattern matches nothing, two claim one tensor, or a rule does not fit the
            method or the number of models.
    """
    chosen = catalogue.get(f"merge/{method}")
    for pattern, rule in rules.items():
        _check_rule(chosen, pattern, rule, models)
    general, claimed = rules.get("*", Rule()), _claimed(rules, names)
    depth = depths(names)
    settings: dict[str, Setting] = {}
    for name in names:
        special = rules[claimed[name]] if name in claimed else Rule()
        weights = special.weights or general.weights or [1.0] * models
        options = {**general.options, **special.options}
        settings[name] = Setting(
            [at(one, depth[name]) for one in weights],
            {key: _valued(value, depth[name]) for key, value in options.items()},
        )
    return Blend(method, settings)


def _claimed(rules: Mapping[str, Rule], names: Sequence[str]) -> dict[str, str]:
    claimed: dict[str, str] = {}
    for pattern in rules:
        if pattern == "*":
            continue
        matches = fnmatch.filter(names, pattern.replace("[", "[[]"))
        if not matches:
            raise UserError(
                f"{pattern} matches no tensor of the models.",
                f"Their tensors have names such as {names[len(names) // 2]}.",
            )
        for name in matches:
            if claimed.get(name, pattern) != pattern and name not in rules:
                raise UserError(
                    f"both {claimed[name]} and {pattern} claim {name}.",
                    "Add a line for that tensor itself; an exact name wins.",
                )
            if claimed.get(name) != name:
                claimed[name] = pattern
    return claimed


def _check_rule(method: catalogue.Method, pattern: str, rule: Rule, models: int) -> None:
    if rule.weights is not None:
        if "shares" not in method.evidence:
            raise UserError(
                f"{method.id} reads no weights of models, and {pattern} has {rule.weights}.",
                f"Its options are {sorted(method.options)}.",
            )
        if len(rule.weights) != models:
            raise UserError(
                f"{pattern} has {len(rule.weights)} weights for {models} models.",
                "Give one for each model, the base left out.",
            )
    check_options(method, rule.options)


def check_options(method: catalogue.Method, options: Mapping[str, Any]) -> None:
    """Refuse options that a merge does not have, or that are of another type.

    Raises:
        UserError: It names them.
    """
    if unknown := options.keys() - method.options.keys():
        raise UserError(
            f"{method.id} has no option {sorted(map(str, unknown))}.",
            f"It has {sorted(method.options)}.",
        )
    for name, value in options.items():
        kind = method.options[name].annotation
        tried = value["curve"][0] if _is_curve(value) else value
        if not fits(tried, kind):
            raise UserError(f"{method.id}: {name} is {value!r}.", f"Write {described(kind)}.")


def _is_curve(value: Any) -> bool:
    return isinstance(value, Mapping) and fits(value.get("curve"), Sequence[float])


def _valued(value: Any, depth: float) -> Any:
    return at(value["curve"], depth) if _is_curve(value) else value


def at(curve: Curve, depth: float) -> float:
    """The value of a curve at a depth from 0 to 1: straight lines between evenly spaced points."""
    if not isinstance(curve, Sequence):
        return float(curve)
    place = depth * (len(curve) - 1)
    low = int(place)
    high, part = min(low + 1, len(curve) - 1), place - low
    return (1 - part) * curve[low] + part * curve[high]


def depths(names: Iterable[str]) -> dict[str, float]:
    """How deep in the model each tensor lies, from 0, the first block, to 1, the last.

    What embeds lies at 0, and everything else outside the blocks at 1.  Where there are no blocks,
    modules take their place in the order of their names' first appearance.
    """
    listed = list(names)
    blocks: dict[str, list[int]] = {}
    for name in listed:
        stack, number = _place(name)
        if stack:
            blocks.setdefault(stack, []).append(number)
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in listed))
    found: dict[str, float] = {}
    for name in listed:
        stack, number = _place(name)
        module = name.rpartition(".")[0]
        if stack:
            order = sorted(set(blocks[stack]))
            found[name] = order.index(number) / (len(order) - 1) if len(order) > 1 else 1.0
        elif blocks:
            word = module.rpartition(".")[2]
            # A head may be called an embedding: embed_out.
            found[name] = 0.0 if word not in HEADS and (embeds(word) or word == "wte") else 1.0
        else:
            found[name] = modules.index(module) / max(1, len(modules) - 1)
    return found


def _place(name: str) -> tuple[str, int]:
    """The stack of blocks that a tensor is in, and the number of its block; "" outside."""
    block = block_of(name.rpartition(".")[0] + ".")
    found = re.fullmatch(r"(.*)\.(\d+)", block)
    return (found[1], int(found[2])) if found else ("", 0)


@dataclass(frozen=True)
class Written:
    """What a file says of a merge; "" and () where it says nothing."""

    method: str
    models: Sequence[str]
    base: str
    dtype: str
    rules: Mapping[str, Rule]


def read_blend(file: Path) -> Written:
    """Read the plan of a merge.

    Raises:
        UserError: It is no such plan; the message names the entry.
    """
    content = read_yaml(file, "plan of a merge", "A merge writes merge.yaml beside its output.")
    if not isinstance(content, dict) or not isinstance(content.get("tensors"), dict):
        raise UserError(f"{file} has no `tensors:`.", _KNOWN)
    if unknown := content.keys() - set(_FIELDS):
        raise UserError(f"{file} has the unknown entries {sorted(map(str, unknown))}.", _KNOWN)
    models = content.get("models") or ()
    if not fits(models, Sequence[str]):
        raise UserError(f"{file}: models is {models!r}.", "Write a list of paths.")
    rules: dict[str, Rule] = {}
    for pattern, given in content["tensors"].items():
        if not isinstance(given, dict):
            raise UserError(f"{file}: {pattern} is not a mapping.", "Write {weights: [1, 0.5]}.")
        weights = given.get("weights")
        if weights is not None and not fits(weights, Sequence[float | Sequence[float]]):
            raise UserError(
                f"{file}: {pattern} has the weights {weights!r}.",
                "Write a number for each model, or a list of numbers over depth.",
            )
        options = {key: value for key, value in given.items() if key != "weights"}
        rules[str(pattern)] = Rule(
            None if weights is None else [_floats(one) for one in weights], options
        )
    said = {key: str(content.get(key) or "") for key in ("method", "base", "dtype")}
    return Written(models=tuple(models), rules=rules, **said)


def _floats(given: int | float | Sequence[int | float]) -> Curve:
    """YAML reads 1 as a whole number."""
    return [float(one) for one in given] if isinstance(given, Sequence) else float(given)


def to_yaml(blend: Blend, models: Sequence[str], base: str, dtype: str) -> str:
    """The plan as a file: what most tensors have in common, then the others."""
    alike: dict[str, list[str]] = {}
    for name, setting in blend.settings.items():
        alike.setdefault(yaml.safe_dump(_plain(blend, setting)), []).append(name)
    usual = max(alike, key=lambda text: len(alike[text]), default="")
    tensors: dict[str, Any] = {}
    for text, names in alike.items():
        content = yaml.safe_load(text)
        tensors |= {"*": content} if text == usual else dict.fromkeys(names, content)
    head: dict[str, Any] = {"method": blend.method, "models": list(models)}
    head |= {name: value for name, value in (("base", base), ("dtype", dtype)) if value}
    lines = [
        "# The plan of a merge: `layerwise merge --plan THIS -o OUT`.  Edit it freely.",
        "# A name may be a pattern (model.layers.*.mlp.*); an exact name wins over a pattern.",
        yaml.safe_dump(head, sort_keys=False).rstrip(),
        "tensors:",
    ]
    for name, content in sorted(tensors.items(), key=lambda item: item[0] != "*"):
        flow = yaml.safe_dump(content, default_flow_style=True, sort_keys=False, width=10_000)
        key = yaml.safe_dump(name, width=10_000).removesuffix("...\n").rstrip()
        lines.append(f"  {key}: {flow.rstrip()}")
    return "\n".join(lines) + "\n"


def _plain(blend: Blend, setting: Setting) -> dict[str, Any]:
    shares = {"weights": list(setting.shares)} if "shares" in blend.merger.evidence else {}
    return shares | dict(setting.options)
