"""The plan: what happens to every layer, and why.  A YAML file a person can read and edit."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml

from layerwise.core import catalogue
from layerwise.core.activation import Scheme, kind, needing, static
from layerwise.core.errors import UserError
from layerwise.core.reading.structure import Layer, Structure
from layerwise.core.results import Layout
from layerwise.core.rewriting.rewriting import Rewriting, Rotate, Widths
from layerwise.core.running.evidence import calibrated_words
from layerwise.core.written import check_types, described, fits, read_yaml

# What calibration shows methods.
Inputs = Literal["transformed", "original"]
# What is tuned once layers are transformed: see core/running/tuning.py.
Tune = Literal["norms", "bias"]


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What happens to one layer, in this order: prune, quantize, compensate.

    Attributes:
        bits: Width of a code; None leaves the weights in their own dtype.
        group: Inputs that share a grid; 0 is the whole row.
        symmetric: No zero points are stored.
        method: Quantizer.
        density: Fraction of weights kept.
        pruner: Pruner, used when the density is below 1.
        rank: Columns of the low-rank correction; 0 is none.
        compensator: Compensator, used when the rank is above 0.
        activation: How the layer's input is rounded when the model runs; "" leaves it to the
            quantizer, of which most leave it as it is.
        dense: The quantized weights are stored in full: the format has no place for their codes.
        score: How sensitive the layer is, as the plan's maker saw it; None if it did not look.
        why: Why the layer got this, in words.
    """

    bits: int | None = None
    group: int = 128
    symmetric: bool = False
    method: str = "rtn"
    density: float = 1.0
    pruner: str = "magnitude"
    rank: int = 0
    compensator: str = "svd"
    activation: Scheme | Literal[""] = ""
    dense: bool = False
    score: float | None = None
    why: str = ""

    @property
    def work(self) -> "LayerPlan":
        """The plan without its reasons: equal for layers that are treated alike."""
        return replace(self, score=None, why="")

    @property
    def quantizer(self) -> catalogue.Method:
        """The method that makes the codes, if there are to be any."""
        return catalogue.get(f"quantize/{self.method}")

    @property
    def codes(self) -> catalogue.Codes | None:
        """What the codes stand for; None if there are to be none."""
        return None if self.bits is None else self.quantizer.codes

    @property
    def coded(self) -> bool:
        """Whether codes are what is stored."""
        return self.bits is not None and not self.dense

    @property
    def joint(self) -> bool:
        """Whether the codes are learned together with those of other layers of the block."""
        learned = self.bits is not None and self.density == 1
        return learned and self.quantizer.learns is not None and self.quantizer.unit == "block"

    @property
    def recoverable(self) -> bool:
        """Whether there are weights that can be learned anew: some are gone, and none is a code."""
        return self.density < 1 and self.bits is None and not self.rank

    @property
    def rounding(self) -> Scheme | Literal[""]:
        """How the layer's input is rounded: as the plan says, or as its quantizer does."""
        return "" if self.bits is None else self.activation or self.quantizer.activates

    def told(self, options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """All that the layout of the codes depends on: see `Coded.layout`."""
        method = self.quantizer
        usual = {name: option.default for name, option in method.own_options.items()}
        grid = {"bits": self.bits, "group": self.group, "symmetric": self.symmetric}
        return usual | dict(options.get(method.id, {})) | grid | {"codes": method.codes}

    @property
    def steps(self) -> list[tuple[str, dict[str, Any]]]:
        """The methods to run, in order, each with the options this plan sets."""
        made: list[tuple[str, dict[str, Any]]] = []
        if self.density < 1:
            made.append((f"prune/{self.pruner}", {"density": self.density}))
        if self.bits is not None:
            grid = {"bits": self.bits, "group": self.group, "symmetric": self.symmetric}
            made.append((f"quantize/{self.method}", grid))
        if self.rank:
            made.append((f"compensate/{self.compensator}", {"rank": self.rank}))
        return made

    def layout(self, layer: Layer, options: Mapping[str, Mapping[str, Any]]) -> Layout:
        """The tensors that a layer's codes are stored as."""
        return self.quantizer.stores.layout(layer.rows, layer.width, self.told(options))


@dataclass(frozen=True, slots=True)
class Plan:
    """Every layer's plan, and what they have in common.

    Attributes:
        layers: Plan of each layer, by the layer's full name.
        format: How the output is stored.
        options: Options of methods beyond what a layer's plan sets, by method id.
        budget: The budget the plan was made for, as given; "" for none.
        inputs: What calibration shows methods: what layers see after earlier blocks were
            transformed, or in the original model.
        server: What is to load the output, whose rules the plan must keep; "" for any.
        rewriting: What the model becomes before all else: other bases, fewer units or blocks.
        tune: What is tuned once layers are transformed: statistics of batch norms, biases.
        recover: The method by which pruned layers are learned anew, block by block; "none" leaves
            them as their pruner made them.
    """

    layers: Mapping[str, LayerPlan]
    format: str = "dense"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    budget: str = ""
    inputs: Inputs = "transformed"
    server: str = ""
    rewriting: Rewriting = field(default_factory=Rewriting)
    tune: Sequence[Tune] = ()
    recover: str = "none"

    @property
    def needing(self) -> list[str]:
        """What cannot do without a calibration text, beside methods."""
        rounding = needing(layer.activation for layer in self.layers.values())
        return [*rounding, *tuning(self.tune), *recovering(self.recover)]

    def words(self) -> frozenset[str]:
        """The evidence that calibration must gather for it."""
        return words_of(self.layers.values())

    def methods(self) -> list[catalogue.Method]:
        """Every method the plan uses, once."""
        ids = {id for layer in self.layers.values() for id, _ in layer.steps}
        ids.update(removers(self.rewriting), recovering(self.recover))
        return [catalogue.get(id) for id in sorted(ids)]


def removers(rewriting: Rewriting) -> list[str]:
    """The methods, by id, that say which blocks or units go."""
    blocks = [f"measure/{rewriting.drop_by}"] if rewriting.drop_blocks else []
    return [*blocks, *([f"narrow/{rewriting.narrow}"] if rewriting.narrow else [])]


def tuning(asked: Sequence[Tune]) -> list[str]:
    """What is asked for, in words, that reads a calibration text."""
    return [f"tuning ({', '.join(asked)})"] if asked else []


def recovering(asked: str) -> list[str]:
    """The method, by id, by which pruned layers are learned anew, if there is one."""
    return [] if asked == "none" else [f"recover/{asked}"]


def sampling(
    plans: Iterable[LayerPlan], options: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Options with which to see what work takes: a step of learning holds what all of them do."""
    learned = {p.quantizer.id for p in plans if p.bits is not None and p.quantizer.learns}
    steps = {id: {"steps": 1} for id in learned}
    return {id: {**options.get(id, {}), **steps.get(id, {})} for id in {*options, *steps}}


def words_of(plans: Iterable[LayerPlan]) -> frozenset[str]:
    """The evidence that calibration must gather for some layers."""
    layers = set(plans)
    rounding = {"peak"} if any(static(layer.rounding) for layer in layers) else set[str]()
    methods = {id for layer in layers for id, _ in layer.steps}
    return calibrated_words(map(catalogue.get, methods)) | rounding


# Entries of a plan's file that say what the model becomes before all else.
_REWRITING: Mapping[str, Any] = {
    "drop_blocks": int,
    "drop_by": str,
    "narrow": str,
    "keep": float,
    "widths": Widths,
    "rotate": Rotate,
    "rotate_seed": int,
    "scale_keys": bool,
}
_FIELDS: Mapping[str, Any] = {f.name: f.type for f in fields(LayerPlan)}


def to_yaml(plan: Plan, model: str, found: Structure) -> str:
    """The plan as a file: one line per layer, then what is left alone and why."""
    head: dict[str, str | int | float | list[Tune]] = {"model": model, "format": plan.format}
    if plan.server:
        head["server"] = plan.server
    if plan.budget:
        head["budget"] = plan.budget
    head["inputs"] = plan.inputs
    head |= _rewriting_entries(plan.rewriting)
    if plan.tune:
        head["tune"] = list(plan.tune)
    if plan.recover != "none":
        head["recover"] = plan.recover
    lines = [
        "# A layerwise plan: `layerwise compress MODEL --plan THIS -o OUT`.  Edit it freely.",
        "# A name may be a pattern (model.layers.*.mlp.*); an exact name wins over a pattern, and",
        "# the order of lines does not matter.  A layer under `layers` with `{}` stays as it is.",
        yaml.safe_dump(head, sort_keys=False).rstrip(),
    ]
    if plan.options:
        options = {id: dict(chosen) for id, chosen in plan.options.items()}
        lines.append(yaml.safe_dump({"options": options}).rstrip())
    lines.append("layers:")
    for name, layer in plan.layers.items():
        lines.append(f"  {_scalar(name)}: {_flow(_set_fields(layer))}")
    lines.append("leave:  # for the reader; these are never touched")
    lines += [f"  {_scalar(name)}: {_scalar(reason)}" for name, reason in found.left.items()]
    return "\n".join(lines) + "\n"


def _rewriting_entries(first: Rewriting) -> dict[str, str | int | float]:
    """What a file says of what the model becomes before all else."""
    made: dict[str, str | int | float] = {}
    if first.drop_blocks:
        made |= {"drop_blocks": first.drop_blocks, "drop_by": first.drop_by}
    if first.narrow:
        made |= {"narrow": first.narrow, "keep": first.keep, "widths": first.widths}
    if first.rotate != "none":
        made |= {"rotate": first.rotate, "rotate_seed": first.seed}
    if first.scale_keys:
        made["scale_keys"] = True
    return made


def read_rewriting(file: Path) -> tuple[Rewriting, Mapping[str, Mapping[str, Any]]]:
    """What a plan file has a model become before its layers are looked at, and all its options.

    Raises:
        UserError: It is no plan.
    """
    content = _content(file)
    return _rewriting(content, file), content["options"]


def read_plan(file: Path, found: Structure) -> Plan:
    """Read a plan file and lay its patterns over the layers of a model, rewritten by now.

    Raises:
        UserError: It is no plan, names an unknown layer, field or method, leaves a layer out,
            or two patterns claim one layer.
    """
    content = _content(file)
    options, format = content["options"], content.get("format", "dense")
    # YAML reads a bare 1 as a number; names are text.
    layers = _lay_out({str(name): given for name, given in content["layers"].items()}, found, file)
    if not isinstance(format, str):
        raise UserError(f"{file} has format: {format!r}.", "Write its name, such as dense.")
    inputs = content.get("inputs", "transformed")
    if inputs not in get_args(Inputs):
        raise UserError(f"{file} has inputs: {inputs!r}.", f"Write {described(Inputs)}.")
    budget, server = (str(content.get(name) or "") for name in ("budget", "server"))
    tune = content.get("tune") or ()
    recover = content.get("recover", "none")
    told = {"tune": tune, "recover": recover}
    check_types(str(file), told, {"tune": Sequence[Tune], "recover": str})
    first = _rewriting(content, file)
    return Plan(layers, format, options, budget, inputs, server, first, tuple(tune), recover)


def _content(file: Path) -> dict[str, Any]:
    """A plan's entries, with its options at least empty."""
    content = read_yaml(file, "plan", "`layerwise plan` writes one.")
    if not isinstance(content, dict) or not isinstance(content.get("layers"), dict):
        raise UserError(f"{file} has no `layers:`.", "`layerwise plan` writes one to start from.")
    known = {"model", "format", "server", "budget", "inputs", "options", "layers", "leave"}
    known |= _REWRITING.keys() | {"tune", "recover"}
    if unknown := content.keys() - known:
        raise UserError(
            f"{file} has the unknown entries {sorted(map(str, unknown))}.",
            f"Known: {sorted(known)}.",
        )
    options = content.get("options") or {}
    if not fits(options, Mapping[str, Mapping[str, Any]]):
        raise UserError(
            f"{file}: `options` is not a mapping of methods.",
            "Write quantize/gptq: {damping: 0.1}.",
        )
    return {**content, "options": options}


def _rewriting(content: Mapping[str, Any], file: Path) -> Rewriting:
    given = {name: content[name] for name in _REWRITING if name in content}
    check_types(str(file), given, _REWRITING)
    seed = {"seed": given.pop("rotate_seed")} if "rotate_seed" in given else {}
    return Rewriting(**given, **seed)


def _lay_out(patterns: Mapping[str, Any], found: Structure, file: Path) -> dict[str, LayerPlan]:
    claimed: dict[str, str] = {}
    for pattern in patterns:
        if pattern in found.layers:
            continue
        # A bracket is part of an expert's name, not a set of characters.
        literal = pattern.replace("[", "[[]")
        matches = [name for name in found.layers if fnmatch.fnmatchcase(name, literal)]
        if not matches:
            reason = found.left.get(pattern) or found.left.get(f"{pattern}.weight")
            why = f"which is left alone: {reason}" if reason else "but the model has no such layer"
            if not reason and "[" in pattern:
                why += " (a bracket stands for itself)"
            raise UserError(
                f"{file} plans {pattern}, {why}.",
                "`layerwise inspect MODEL` lists the layers.",
            )
        for name in matches:
            if name in claimed and name not in patterns:
                raise UserError(
                    f"{file}: both {claimed[name]} and {pattern} claim {name}.",
                    f"Add a line for {name} itself; an exact name wins.",
                )
            claimed[name] = pattern
    layers: dict[str, LayerPlan] = {}
    for name in found.layers:
        source = name if name in patterns else claimed.get(name)
        if source is None:
            raise UserError(
                f"{file} says nothing of the layer {name}.",
                f"Add it under `layers`; `{name}: {{}}` leaves it as it is.",
            )
        layers[name] = _layer_plan(source, patterns[source] or {}, file)
    return layers


def _layer_plan(name: str, given: Any, file: Path) -> LayerPlan:
    if not isinstance(given, dict):
        raise UserError(f"{file}: {name} is not a mapping.", "Write name: {bits: 4, group: 32}.")
    if unknown := given.keys() - _FIELDS.keys():
        raise UserError(
            f"{file}: {name} has the unknown fields {sorted(map(str, unknown))}.",
            f"Known: {', '.join(_FIELDS)}.",
        )
    check_types(f"{file}: {name}", given, _FIELDS)
    return LayerPlan(**given)


def check_plan(plan: Plan, found: Structure) -> None:
    """Refuse now what would go wrong later.

    Raises:
        UserError: A number out of range, an unknown method or option, or fused layers with
            different grids.
    """
    for id, options in plan.options.items():
        check_options(id, options)
    for name, layer_plan in plan.layers.items():
        _check_layer(name, layer_plan, found.layers[name])
        for id, _ in layer_plan.steps:
            _check_rows(id, found.layers[name], plan, found)
    for item in found.items():
        _check_fused(item, plan)
    for id in recovering(plan.recover):
        # The smallest weight shows whether its options are possible.
        one = {"weight": torch.zeros(1, 1), "kept": torch.ones(1, 1, dtype=torch.bool)}
        catalogue.get(id).run(**one, **plan.options.get(id, {}))
    if recovering(plan.recover) and not any(one.recoverable for one in plan.layers.values()):
        raise UserError(
            f"recover/{plan.recover} learns pruned weights anew, and no layer is pruned that is "
            "not quantized, too.",
            "Give --density 0.5 without --bits, or leave --recover out.",
        )
    if not (plan.rewriting.removes or any(layer.steps for layer in plan.layers.values())):
        raise UserError("the plan changes no layer.", "Set bits, density or rank for at least one.")


def check_options(id: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a method does not have, or that are of another type.

    Raises:
        UserError: It names them.
    """
    method = catalogue.get(id)
    own = method.own_options
    if unknown := options.keys() - own.keys():
        raise UserError(
            f"{id} has no option {sorted(map(str, unknown))}.", f"It has {sorted(own)}."
        )
    for name, value in options.items():
        default = own[name].default
        if default is not None and not fits(value, type(default)):
            raise UserError(
                f"{id}: {name} is {value!r}.", f"Write {described(type(default))}, as {default!r}."
            )


def _check_layer(name: str, plan: LayerPlan, layer: Layer) -> None:
    widths = catalogue.WIDTHS if plan.bits is None else plan.quantizer.widths
    allowed = (
        (
            plan.bits is None or plan.bits in widths,
            f"bits {plan.bits}",
            f"Bits go from {widths[0]} to {widths[-1]}."
            if len(widths) > 1
            else f"quantize/{plan.method} has codes of {widths[0]} bits only.",
        ),
        (
            plan.bits != 1 or not plan.symmetric,
            "bits 1 with a symmetric grid, which has one value",
            "Give 2 bits or more, or leave out the symmetry.",
        ),
        (
            0 < plan.density <= 1 and round(plan.density * layer.count) > 0,
            f"density {plan.density}",
            "Density is at most 1, and keeps at least one weight.",
        ),
        (
            0 <= plan.rank <= min(layer.rows, layer.width),
            f"rank {plan.rank}",
            f"Rank goes from 0 to {min(layer.rows, layer.width)} for a layer of "
            f"{layer.rows} x {layer.width}.",
        ),
        (
            plan.bits is None or plan.density == 1 or plan.codes in catalogue.MASKABLE,
            f"density {plan.density} with quantize/{plan.method}, whose codes have no zeros to "
            "leave out",
            "Use another quantizer, such as gptq, or leave the density at 1.",
        ),
        (
            not plan.activation or plan.bits is not None,
            f"activation {plan.activation} of weights that are not quantized",
            "Give bits, too.",
        ),
        (
            not (plan.activation and plan.quantizer.activates)
            or kind(plan.activation) == kind(plan.quantizer.activates),
            f"activation {plan.activation} with quantize/{plan.method}, which rounds inputs to "
            f"{plan.quantizer.activates} in its own way",
            "Leave the activation out, or take another quantizer.",
        ),
        (plan.group >= 0, f"group {plan.group}", "A group is a number of inputs; 0 is the row."),
    )
    for fine, given, remedy in allowed:
        if not fine:
            raise UserError(f"{name}: {given} is not possible.", remedy)
    if plan.bits is not None and plan.group and layer.width % plan.group:
        divisors = [g for g in (16, 32, 64, 128, 256) if layer.width % g == 0]
        raise UserError(
            f"{name}: a group of {plan.group} does not divide its width of {layer.width}.",
            f"Groups that do: {', '.join(map(str, [*divisors, layer.width]))}; "
            "0 stands for the whole row.",
        )


def _check_rows(id: str, layer: Layer, plan: Plan, found: Structure) -> None:
    """A method that reads an input's layers together needs all of them, and a foldable input."""
    method = catalogue.get(id)
    if method.rows != "input" or not (layer.feeder or method.must_fold):
        return
    together = [other for other in found.layers.values() if other.reads == layer.reads]
    if len({plan.layers[other.name].work for other in together}) > 1:
        raise UserError(
            f"{id} scales the input that {', '.join(o.name for o in together)} read together, but "
            "the plan treats them differently.",
            "Give them the same bits, group and method.",
        )
    if not layer.feeder:
        raise UserError(
            f"{id} cannot be used on {layer.name}: nothing that feeds it can take its scales.",
            "Give that layer another method, such as rtn.",
        )


def _check_fused(item: list[Layer], plan: Plan) -> None:
    grids = {
        layer.name: (
            plan.layers[layer.name].bits,
            plan.layers[layer.name].group,
            plan.layers[layer.name].symmetric,
            plan.layers[layer.name].codes,
        )
        for layer in item
    }
    if len(set(grids.values())) > 1:
        raise UserError(
            "servers hold these layers as one matrix, but the plan gives them different grids: "
            + ", ".join(f"{name} {bits} bits" for name, (bits, *_) in grids.items()),
            "Give them the same bits, group and symmetry, and codes of one kind.",
        )


def _set_fields(layer: LayerPlan) -> dict[str, Any]:
    shown = asdict(layer)
    if layer.bits is None:
        for name in ("bits", "group", "symmetric", "method"):
            shown.pop(name)
    for name in ("activation", "dense"):
        if not shown[name]:
            shown.pop(name)
    if layer.density == 1:
        shown.pop("density")
        shown.pop("pruner")
    if not layer.rank:
        shown.pop("rank")
        shown.pop("compensator")
    if layer.score is None:
        shown.pop("score")
    if not layer.why:
        shown.pop("why")
    return shown


def _scalar(value: str) -> str:
    return yaml.safe_dump(value, width=10_000).removesuffix("...\n").rstrip()


def _flow(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(
        dict(value), default_flow_style=True, sort_keys=False, width=10_000
    ).rstrip()
