"""What the user asks for; a plan comes of it."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import Parameter
from typing import Any, Literal, get_type_hints

from layerwise import export
from layerwise.core import catalogue
from layerwise.core.activation import Scheme, needing
from layerwise.core.errors import UserError
from layerwise.core.plan import Inputs, LayerPlan, Tune, recovering, removers, tuning
from layerwise.core.reading.structure import Structure
from layerwise.core.rewriting.rewriting import Rewriting, Rotate, Widths
from layerwise.core.written import UNITS, described, fits
from layerwise.export import servers
from layerwise.export.layerwise import NAME

LEVELS = (2, 3, 4, 8)
GROUPS = (128, 64, 32, 16)
ALLOWED = ("bits", "density", "rank")

# How the errors of layers are weighed against each other: see flow/sensitivity.py.
Sensitivity = Literal["", "error", "energy", "fisher", "kl", "hessian"]


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asked for; a plan comes of it.

    Attributes:
        bits: Width of every layer; None when a budget decides, or nothing is quantized.
        budget: "3.5bits" stored per weight, "40%" of the files, or "1.2GiB" of them.
        max_kl: Instead of a budget: the smallest model whose KL to the original, in nats per
            token on the text that it is compared on, is not above this.
        allow: What a budget may choose among, by "bits", "density" and "rank": every combination
            is a level.  Bits None is the layer's own dtype; bits that are not named are those
            of `LEVELS` that the method has and the server loads.
        group: Inputs that share a grid; 0 is the whole row, None the largest of `GROUPS` that is
            not above the quantizer's own and divides the width of every layer, or the row if none
            is, or what the format has.
        symmetric: No zero points; None for what the format takes and the quantizer does by itself.
        method: Quantizer.
        density: Fraction of weights kept.
        pruner: Pruner.
        pattern: "2:4" and the like: so many weights of every so many inputs are kept, which says
            the density, too; "" for none.
        narrow: What takes out units (heads, channels), so that the model is smaller; "" for none.
        keep: Fraction of the weights of layers that stays then.
        widths: Whether all blocks keep as many units, or each its own number, as zeros.
        drop_blocks: How many blocks go.
        drop_by: The measure of blocks by which the least important go.
        rank: Columns of a low-rank correction.
        compensator: Compensator.
        allocate: Allocator; "" is knapsack for a budget, and the same density everywhere.
        measure: Measure that an allocator by scores goes by.
        sensitivity: How an allocator by errors weighs one layer's against another's; "" is
            fisher where the model runs on a calibration text, and error where it does not.
        inputs: What calibration shows methods: what layers see after earlier ones were changed,
            or in the original model, which lets results be kept for other budgets.  "" is the
            original for a budget, and the changed for one level everywhere.
        activation: How the inputs of layers are rounded when the model runs; "" leaves it to the
            quantizer, of which most leave them as they are.
        format: How the output is stored; "" is what the server loads best, or dense, or layerwise
            where inputs are rounded.
        options: Options of methods, by id.
        server: What is to load the output; "" for anything that loads the format.
        rotate: Turn the residual stream, and each head's values, by an orthogonal matrix first:
            the model stays the same function, and outliers are spread over all entries.
        rotate_seed: What is random in that matrix.
        scale_keys: Even out the pairs of keys that rotary embeddings turn first, for a cache of
            rounded keys; the model stays the same function.
        recover: How pruned layers are learned anew, block by block; "none" leaves them.
        tune: What is tuned once layers are transformed: "norms" estimates the statistics of batch
            norms again, "bias" moves biases.
    """

    bits: int | None = None
    budget: str = ""
    max_kl: float | None = None
    allow: Mapping[str, Sequence[int | float | None]] = field(
        default_factory=dict[str, Sequence[int | float | None]]
    )
    group: int | None = None
    symmetric: bool | None = None
    method: str = "rtn"
    density: float = 1.0
    pruner: str = "magnitude"
    pattern: str = ""
    narrow: str = ""
    keep: float = 1.0
    widths: Widths = "shared"
    drop_blocks: int = 0
    drop_by: str = "lim"
    rank: int = 0
    compensator: str = "svd"
    allocate: str = ""
    measure: str = "lim"
    sensitivity: Sensitivity = ""
    inputs: Inputs | Literal[""] = ""
    activation: Scheme | Literal[""] = ""
    format: str = ""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    server: str = ""
    rotate: Rotate = "none"
    rotate_seed: int = 0
    scale_keys: bool = False
    tune: Sequence[Tune] = ()
    recover: str = "none"

    def __post_init__(self) -> None:
        """Refuse what is not written as it must be.

        Raises:
            UserError: It names the field.
        """
        for name, kind in get_type_hints(Wish).items():
            if not fits(given := getattr(self, name), kind):
                raise UserError(f"{name} is {given!r}.", f"Write {described(kind)}.")
        rounds = self.activation or self._quantizer.activates
        default = NAME if rounds and (self.bits is not None or self.shares_bytes) else "dense"
        default = servers.default_format(self.server) if self.server else default
        object.__setattr__(self, "format", self.format or default)
        if self.budget:
            budget_amount(self.budget)
        if self.max_kl is not None and not self.max_kl > 0:
            raise UserError(
                f"a KL of at most {self.max_kl} is asked for.", "Give more than 0, such as 0.02."
            )
        asked = {"bits": self.bits is not None, "budget": bool(self.budget)}
        asked["max_kl"] = self.max_kl is not None
        if sum(asked.values()) > 1:
            both = " and ".join(name for name, is_asked in asked.items() if is_asked)
            raise UserError(
                f"{both} are asked for at once.",
                "Leave one out: a budget chooses the bits of each layer.",
            )
        if self.pattern:
            self._take_pattern()
        self._check_removed()
        self._check_allowed()

    def _take_pattern(self) -> None:
        """Put a pattern into the density, and into the pruner's option."""
        match = re.fullmatch(r"([1-9][0-9]*):([1-9][0-9]*)", self.pattern)
        if not match or int(match[1]) > int(match[2]):
            raise UserError(
                f"{self.pattern!r} is not a pattern.", "Write 2:4: two of every four are kept."
            )
        id, among = f"prune/{self.pruner}", int(match[2])
        if "among" not in catalogue.get(id).options:
            able = [m.name for m in catalogue.methods("prune") if "among" in m.options]
            raise UserError(f"{id} keeps no pattern.", f"Take {', '.join(able)}.")
        given = self.options.get(id, {})
        if self.density != 1 or "among" in given or "density" in self.allow or self.allocate:
            raise UserError(
                f"a pattern of {self.pattern} says how many weights every layer keeps, and "
                "something else says it, too.",
                "Leave out --density, --allow density=, --allocate and the pruner's own option.",
            )
        object.__setattr__(self, "density", int(match[1]) / among)
        object.__setattr__(self, "options", {**self.options, id: {**given, "among": among}})
        object.__setattr__(self, "pattern", "")  # it is said now

    def _check_removed(self) -> None:
        if self.narrow and not 0 < self.keep < 1:
            raise UserError(
                f"--narrow {self.narrow} is to keep {self.keep:g} of the weights.",
                "Say how much stays, between 0 and 1: --keep 0.8.",
            )
        if self.keep != 1 and not self.narrow:
            raise UserError(
                f"{self.keep:g} of the weights are to stay, and nothing says which units go.",
                "Add --narrow flap; or --density for single weights.",
            )
        if self.drop_blocks < 0:
            raise UserError(f"{self.drop_blocks} blocks are to go.", "Give 0 or more.")

    def _check_allowed(self) -> None:
        if self.allow and not self.shares_bytes:
            raise UserError(
                f"{', '.join(self.allow)} may be chosen among, and no budget says how.",
                "Add --budget 3.5bits (or 40%, 1.2GiB) or --max-kl 0.02.",
            )
        for name, values in self.allow.items():
            if name not in ALLOWED:
                raise UserError(
                    f"{name!r} cannot be allowed.", f"Allow {', '.join(ALLOWED)}: --allow bits=2,4."
                )
            whole = [v for v in values if v is None or float(v).is_integer()]
            if not values or (name != "density" and len(whole) < len(values)):
                raise UserError(
                    f"{name} may be {list(values)}.",
                    "Give whole numbers, at least one." if values else "Give at least one value.",
                )
            if name != "bits" and None in values:
                raise UserError(f"{name} may be none.", "Give numbers; only bits can be none.")
        fixed = {"density": self.density != 1, "rank": self.rank != 0}
        if twice := [name for name, given in fixed.items() if given and name in self.allow]:
            raise UserError(
                f"{twice[0]} is {getattr(self, twice[0])}, and may be "
                f"{list(self.allow[twice[0]])} as well.",
                f"Leave one of --{twice[0]} and --allow {twice[0]}= out.",
            )

    @property
    def rewriting(self) -> Rewriting:
        """What the model becomes before all else."""
        return Rewriting(
            self.rotate,
            self.rotate_seed,
            self.scale_keys,
            self.drop_blocks,
            self.drop_by,
            self.narrow,
            self.keep,
            self.widths,
        )

    @property
    def shares_bytes(self) -> bool:
        """Whether layers get different levels for a size or a quality of the whole."""
        return bool(self.budget) or self.max_kl is not None

    @property
    def learning(self) -> list[str]:
        """What reads a calibration text beside methods, if there is one."""
        return ["the sensitivity of layers"] if self.shares_bytes else []

    @property
    def needing(self) -> list[str]:
        """What cannot do without a calibration text, beside methods."""
        return [*needing([self.activation]), *tuning(self.tune), *recovering(self.recover)]

    def level(self, bits: int | None) -> LayerPlan:
        """The plan of a layer at a width, on the grid that its format has for it."""
        format = export.kind(self.format)
        group, symmetric = format.grid(bits or 0)
        # Points that lie alike on both sides of 0.0 need no zero points.
        pointed = self._quantizer.codes in ("float8", "points")
        alike = bits is not None and (pointed or self._usual("symmetric", False))
        centred = self._rules.symmetric or alike
        return LayerPlan(
            bits,
            (group or 0) if self.group is None else self.group,
            bool(symmetric or centred) if self.symmetric is None else self.symmetric,
            self.method,
            self.density,
            self.pruner,
            self.rank,
            self.compensator,
            activation="" if bits is None else self.activation,
            dense=bits is not None and self._quantizer.codes not in format.codes,
        )

    def combinations(self) -> list[LayerPlan]:
        """Every level that a budget may choose."""
        named: dict[str, Sequence[int | float | None]] = {
            "bits": self._usual_widths(),
            "density": (self.density,),
            "rank": (self.rank,),
            **self.allow,
        }
        return [
            replace(
                self.level(None if bits is None else int(bits)),
                density=float(density or 0),
                rank=int(rank or 0),
            )
            for bits, density, rank in itertools.product(*(named[name] for name in ALLOWED))
        ]

    def fitted(self, found: Structure) -> "Wish":
        """The same with a group that fits a model, if none was asked for."""
        chosen_by_format, _ = export.kind(self.format).grid(LEVELS[0])
        if self.group is not None or chosen_by_format is not None:
            return self
        widths = {layer.width for layer in found.layers.values()}
        loaded = (self._rules.groups or {}).get(self._quantizer.codes, GROUPS)
        usual = [
            group
            for group in GROUPS
            if group in loaded and group <= self._usual("group", GROUPS[0])
        ]
        fitting = (g for g in usual if all(w % g == 0 for w in widths))
        return replace(self, group=next(fitting, 0))

    def methods(self) -> list[catalogue.Method]:
        """Every method it names, so that a misspelt one is refused at once.

        Raises:
            UserError: There is no such method, or the server loads no layer that is so made.
        """
        levels = self.combinations() if self.shares_bytes else [self.level(self.bits)]
        for level in levels:
            self._check_server(level)
        used = {id: catalogue.get(id) for level in levels for id, _ in level.steps}
        others = [*removers(self.rewriting), *recovering(self.recover)]
        used |= {id: catalogue.get(id) for id in others}
        if allocator := self.allocator():
            used[allocator.id] = allocator
            if "scores" in allocator.evidence:
                used[f"measure/{self.measure}"] = catalogue.get(f"measure/{self.measure}")
        return list(used.values())

    @property
    def _quantizer(self) -> catalogue.Method:
        return catalogue.get(f"quantize/{self.method}")

    def _usual(self, option: str, otherwise: Any) -> Any:
        """What the quantizer's option is if nothing is said; another value if it must be given."""
        default = self._quantizer.options[option].default
        return otherwise if default is Parameter.empty else default

    @property
    def _rules(self) -> servers.Rules:
        return servers.allowed(self.server, self.format)

    def _usual_widths(self) -> Sequence[int]:
        method = self._quantizer
        known = self._rules.widths
        loaded = method.widths if known is None else known.get(method.codes, ())
        return [bits for bits in LEVELS if bits in method.widths and bits in loaded] or LEVELS

    def _check_server(self, level: LayerPlan) -> None:
        """Refuse what the server loads of no model; the group waits for the widths of layers."""
        if self.group is None and (groups := self._rules.groups) is not None:
            level = replace(level, group=next(iter(groups.get(level.codes or "integer", (0,)))))
        servers.check_level(self.server, self.format, level)

    def allocator(self) -> catalogue.Method | None:
        """What shares out the budget, or the density; None if every layer gets the same.

        Raises:
            UserError: It cannot share out what there is to share.
        """
        if not self.shares_bytes and not self.allocate:
            return None
        method = catalogue.get(f"allocate/{self.allocate or 'knapsack'}")
        if not self.shares_bytes and self.density == 1:
            raise UserError(
                f"{method.id} has nothing to share out.",
                "Give --budget 3.5bits for widths, or --density 0.5 for densities.",
            )
        if self.shares_bytes and {"weights", "shapes"}.intersection(method.evidence):
            raise UserError(
                f"{method.id} shares out densities, and --budget asks for widths.",
                "Give --density 0.5 without --budget, or another --allocate.",
            )
        several = [name for name, values in self.allow.items() if len(set(values)) > 1]
        if set(several) - {"bits"} and "errors" not in method.evidence:
            raise UserError(
                f"{method.id} ranks layers for one thing, and {', '.join(several)} may be chosen.",
                "Use --allocate knapsack, which weighs every combination.",
            )
        return method


def budget_amount(budget: str) -> tuple[float, str]:
    """A budget's number and its unit.

    Raises:
        UserError: It is not written as one.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(bits?|%|[KMG]?i?B)\s*", budget)
    unit = match[2] if match else ""
    if not match or (unit not in UNITS and not unit.startswith(("bit", "%"))):
        raise UserError(
            f"{budget!r} is not a budget.", "Write it as 3.5bits, 40% or 1.2GiB (also MB, GB, MiB)."
        )
    return float(match[1]), unit
