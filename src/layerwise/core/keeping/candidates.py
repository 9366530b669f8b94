"""What levels make of layers, kept so that another budget need not make it again.

A candidate is a layer under a plan, made on what the layer sees in the original model: it depends
on no other layer's plan, so any mix of candidates can be put together afterwards.  Its base (mask
and codes) is kept once for all ranks; its correction once, at the highest rank asked for, where
lower ones are parts of it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor

from layerwise.core import catalogue
from layerwise.core.activation import Activation
from layerwise.core.keeping.cache import Cache, Entry
from layerwise.core.packing import pack_bits, unpack_bits
from layerwise.core.plan import LayerPlan
from layerwise.core.reading.structure import Layer
from layerwise.core.results import Coded, LowRank
from layerwise.core.running.apply import Transformed, lost_share

Options = Mapping[str, Mapping[str, Any]]

_ENERGY = "energy"
_CODED = "coded."  # what the names of codes' own tensors begin with


@dataclass(frozen=True, slots=True)
class Losses:
    """What levels cost one layer.

    Attributes:
        energy: Energy of each output before; of its weights, where no input was seen.
        lost: Energy of each output that is lost, by plan.
        notes: What the methods had to tell, by plan.
    """

    energy: Float[Tensor, " out"]
    lost: Mapping[LayerPlan, Float[Tensor, " out"]]
    notes: Mapping[LayerPlan, tuple[str, ...]]

    @classmethod
    def of(cls, done: Transformed) -> "Losses":
        """Those of one plan."""
        work = done.plan.work
        return cls(done.energy, {work: done.lost}, {work: done.notes})

    def error(self, plan: LayerPlan) -> float:
        """Share of the energy that a plan loses."""
        return lost_share(float(self.lost[plan.work].sum()), float(self.energy.sum()))

    def joined(self, more: "Losses | None") -> "Losses":
        """These and others of the same layer."""
        if more is None:
            return self
        return replace(self, lost={**self.lost, **more.lost}, notes={**self.notes, **more.notes})


@dataclass(frozen=True)
class Candidates:
    """The candidates of one model on one calibration text.

    Attributes:
        cache: Where they are kept.
        origin: Digest of all that they are made from beside their plans.
    """

    cache: Cache
    origin: str

    def key(self, *parts: Any) -> str:
        """The key of something made from the same origin."""
        told = json.dumps([self.origin, *parts], sort_keys=True, default=str)
        return hashlib.sha256(told.encode()).hexdigest()

    def has(self, layer: Layer, plan: LayerPlan, options: Options) -> bool:
        """Whether a layer under a plan is kept, whole or not."""
        keys = [self._losses_key(layer), self._base_key(layer, plan, options)]
        keys += [self._correction_key(layer, plan, options)] if plan.rank else []
        return all(self.cache.has(key) for key in keys)

    def find(self, layer: Layer, plan: LayerPlan, options: Options) -> Transformed | None:
        """A layer under a plan; None if it is not kept."""
        losses = self.losses(layer, [plan], options)
        base = self.cache.get(self._base_key(layer, plan, options))
        if losses is None or plan.work not in losses.lost or base is None:
            return None
        low_rank = None
        if plan.rank:
            correction = self.cache.get(self._correction_key(layer, plan, options))
            if correction is None or correction.facts["rank"] < plan.rank:
                return None
            factors = LowRank(correction.tensors["left"], correction.tensors["right"])
            low_rank = factors.truncated(plan.rank)
        kept = None
        if "kept" in base.tensors:
            kept = unpack_bits(base.tensors["kept"], layer.width)
        quantized = _unpacked(base.tensors, base.facts["quantized"], layer, plan)
        weight = base.tensors["weight"] if quantized is None else quantized.dequantize()
        return Transformed(
            layer=layer,
            plan=plan,
            weight=weight if low_rank is None else weight + low_rank.product(),
            base=weight,
            quantized=quantized,
            activation=None if quantized is None else quantized.activation,
            kept=kept,
            low_rank=low_rank,
            lost=losses.lost[plan.work],
            energy=losses.energy,
            notes=losses.notes[plan.work],
        )

    def keep(self, done: Transformed, options: Options) -> None:
        """Keep a layer under a plan, unless its parts are there already."""
        layer, plan = done.layer, done.plan
        key = self._base_key(layer, plan, options)
        if not self.cache.has(key):
            tensors, facts = _packed(done, options)
            if done.kept is not None:
                tensors["kept"] = pack_bits(done.kept)
            if done.quantized is None:
                tensors["weight"] = done.base
            self.cache.put(key, tensors, {"quantized": facts})
        if done.low_rank is None:
            return
        key = self._correction_key(layer, plan, options)
        known = self.cache.get(key)
        if known is None or known.facts["rank"] < plan.rank:
            tensors = {"left": done.low_rank.left, "right": done.low_rank.right}
            self.cache.put(key, tensors, {"rank": plan.rank})

    def losses(self, layer: Layer, plans: Sequence[LayerPlan], options: Options) -> Losses | None:
        """What those of some plans cost that are known; None if nothing is."""
        entry = self.cache.get(self._losses_key(layer))
        if entry is None:
            return None
        named = {plan.work: self._plan_key(plan, options) for plan in plans}
        known = {plan: name for plan, name in named.items() if name in entry.tensors}
        return Losses(
            entry.tensors[_ENERGY],
            {plan: entry.tensors[name] for plan, name in known.items()},
            {plan: tuple(entry.facts[name]) for plan, name in known.items()},
        )

    def keep_losses(self, layer: Layer, losses: Losses, options: Options) -> None:
        """Keep what plans cost, beside what is known already."""
        known = self.cache.get(self._losses_key(layer)) or Entry({}, {})
        names = {plan: self._plan_key(plan, options) for plan in losses.lost}
        tensors = {name: losses.lost[plan] for plan, name in names.items()}
        facts = {name: losses.notes[plan] for plan, name in names.items()}
        self.cache.put(
            self._losses_key(layer),
            {**known.tensors, **tensors, _ENERGY: losses.energy},
            {**known.facts, **facts},
        )

    def _losses_key(self, layer: Layer) -> str:
        return self.key("losses", layer.name)

    def _base_key(self, layer: Layer, plan: LayerPlan, options: Options) -> str:
        return self.key("base", layer.name, self._plan_key(replace(plan, rank=0), options))

    def _correction_key(self, layer: Layer, plan: LayerPlan, options: Options) -> str:
        nested = catalogue.get(f"compensate/{plan.compensator}").nested
        told = replace(plan, rank=1) if nested else plan
        return self.key("correction", layer.name, self._plan_key(told, options))

    def _plan_key(self, plan: LayerPlan, options: Options) -> str:
        """A digest of a plan's steps, with the options of their methods."""
        steps = [(id, dict(options.get(id, {})) | given) for id, given in plan.steps]
        said = [steps, plan.rounding]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:24]


def _packed(done: Transformed, options: Options) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    quantized = done.quantized
    if quantized is None:
        return {}, None
    facts: dict[str, Any] = {"told": done.plan.told(options)}
    tensors = {f"{_CODED}{name}": part for name, part in quantized.parts(facts["told"]).items()}
    if quantized.input_scale is not None:
        tensors["input_scale"] = quantized.input_scale
    if done.activation is not None:
        facts["activation"] = done.activation.scheme
        if done.activation.scale is not None:
            tensors["input_step"] = done.activation.scale
    return tensors, facts


def _unpacked(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None, layer: Layer, plan: LayerPlan
) -> Coded | None:
    if facts is None:
        return None
    parts = {
        name.removeprefix(_CODED): part for name, part in tensors.items() if name.startswith(_CODED)
    }
    coded = plan.quantizer.stores.read(parts, layer.rows, layer.width, facts["told"])
    if "input_scale" in tensors:
        coded = replace(cast("Any", coded), input_scale=tensors["input_scale"])
    if "activation" in facts:
        coded = coded.with_activation(Activation(facts["activation"], tensors.get("input_step")))
    return coded
