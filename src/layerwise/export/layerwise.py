"""layerwise's own format: whatever a plan asks for, at the size it really has.

Plain safetensors.  Codes, scales and zero points; for pruned layers a bitmask and the survivors;
low-rank corrections as two factors.  `docs/format.md` describes every tensor; `layerwise.load`
makes a transformers model of it.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from layerwise.core import catalogue
from layerwise.core.activation import SCHEMES, Activation
from layerwise.core.catalogue import ALL_CODES
from layerwise.core.errors import UserError
from layerwise.core.format import Format
from layerwise.core.packing import BYTE, pack, pack_bits, unpack, unpack_bits, words
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.reading.checkpoint import TensorInfo
from layerwise.core.reading.structure import Layer, Structure
from layerwise.core.results import Coded, Quantized, spread
from layerwise.core.running.apply import Transformed
from layerwise.core.running.products import Answer
from layerwise.export._adapter import corrected, factors

NAME = "layerwise"
VERSION = 3
# The first version that has codes of a kind; files say the least that they need.
_VERSIONS: Mapping[str | None, int] = {None: 1, "integer": 1, "float8": 2}


class Layerwise(Format):
    """Packed codes, bitmasks with their survivors, and low-rank factors, mixed per layer."""

    # A loader that does not know the format finds no weights, instead of loading noise.
    stem = NAME
    codes = ALL_CODES
    activations = frozenset(SCHEMES)
    unpacking = 24.0

    def check(self, plan: Plan, found: Structure) -> None:
        """Refuse experts that share one 3-D tensor."""
        for name, layer_plan in plan.layers.items():
            if found.layers[name].expert is not None and layer_plan.steps:
                raise UserError(
                    f"{NAME} cannot hold {name}: its experts lie in one 3-D tensor.",
                    f"Leave that layer as it is (`{name}: {{}}`), or write --format dense.",
                )

    def whole(self, plan: LayerPlan) -> bool:
        """Survivors follow each other from row to row."""
        return plan.density < 1

    def tensors(self, layer: Layer, plan: LayerPlan, info: TensorInfo) -> list[TensorInfo]:
        """See docs/format.md."""
        if not plan.steps:
            return [info]
        name, sparse = layer.name, plan.density < 1
        made: list[TensorInfo] = []
        if sparse:
            shape = (layer.rows, -(-layer.width // BYTE))
            made.append(TensorInfo(f"{name}.mask", torch.uint8, shape))
        if plan.bits is not None:
            layout = dict(plan.layout(layer, self.options))
            if sparse:
                dtype = layout["codes"][0]
                room = _capacity(layer, plan)
                filled = room if dtype == torch.uint8 else words(room, plan.bits)
                layout["codes"] = (dtype, (1, filled))
            made += [TensorInfo(f"{name}.{part}", *described) for part, described in layout.items()]
            if plan.rounding:
                made.append(TensorInfo(f"{name}.input_step", torch.float32, (1,)))
        elif sparse:
            made.append(TensorInfo(f"{name}.values", info.dtype, (1, _capacity(layer, plan))))
        else:
            made.append(info)
        if plan.rank:
            made.append(TensorInfo(f"{name}.left", info.dtype, (layer.rows, plan.rank)))
            made.append(TensorInfo(f"{name}.right", info.dtype, (plan.rank, layer.width)))
        return made

    def encode(self, done: Transformed, info: TensorInfo) -> dict[str, Tensor]:
        """A layer as those tensors."""
        name, plan, quantized = done.layer.name, done.plan, done.quantized
        made: dict[str, Tensor] = {}
        if done.kept is not None:
            made[f"{name}.mask"] = pack_bits(done.kept)
        if quantized is not None:
            parts = quantized.parts(plan.told(self.options))
            if done.kept is not None:
                assert isinstance(quantized, Quantized)
                codes = _survivors(quantized.codes, done.kept, _capacity(done.layer, plan))
                floats = plan.codes == "float8"
                parts["codes"] = codes.contiguous() if floats else pack(codes, quantized.bits)
            if plan.rounding:
                step = None if done.activation is None else done.activation.scale
                parts["input_step"] = torch.zeros(1) if step is None else step
            made |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        elif done.kept is not None:
            values = _survivors(done.base, done.kept, _capacity(done.layer, plan))
            made[f"{name}.values"] = values.to(info.dtype)
        else:
            made[info.name] = done.layer.store(done.base.to(info.dtype), (-1, *info.shape[1:]))
        if (sides := factors(done, info.dtype)) is not None:
            made[f"{name}.left"], made[f"{name}.right"] = sides
        return made

    def restored(self, done: Transformed, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The codes' own values, or the stored ones, and the stored factors' product."""
        quantized = done.quantized
        base = done.base.to(dtype).float() if quantized is None else quantized.grid_values()
        return corrected(done, base, dtype)

    def config(self, plan: Plan, found: Structure) -> Mapping[str, Any]:
        """What `read` needs."""
        layers = {
            name: {
                "tensor": found.layers[name].tensor,
                "shape": list(self.source.tensors[found.layers[name].tensor].shape),
                "transposed": found.layers[name].layout == "conv1d",
                "bits": layer.bits,
                "codes": layer.codes,
                "group": layer.group,
                "symmetric": layer.symmetric,
                "sparse": layer.density < 1,
                "rank": layer.rank,
                **self._told(layer),
            }
            for name, layer in plan.layers.items()
            if layer.steps
        }
        version = max(map(_version, plan.layers.values()))
        stored = {"quant_method": NAME, "version": version, "layers": layers}
        return {"quantization_config": stored}

    def _told(self, layer: LayerPlan) -> dict[str, Any]:
        """What files of earlier versions do not say of a layer."""
        made: dict[str, Any] = {}
        if layer.coded and layer.codes not in _VERSIONS:
            made |= {"method": layer.method, "told": layer.told(self.options)}
        if layer.rounding:
            made["activation"] = layer.rounding
        return made

    def answer(self, done: Transformed, dtype: torch.dtype) -> Answer | None:
        """The codes' own answer, and the stored factors'."""
        if done.activation is None or done.quantized is None:
            return None
        return _answer(done.quantized.with_activation(done.activation), factors(done, dtype))

    def answers(self) -> Mapping[str, Answer]:
        """What layers answer whose inputs are rounded, by name."""
        made: dict[str, Answer] = {}
        for name, facts in self._layers.items():
            if "activation" in facts:
                step = self.source.read(f"{name}.input_step")
                activation = Activation(facts["activation"], step if float(step) > 0 else None)
                coded = self._coded(name, facts).with_activation(activation)
                made[name] = _answer(coded, self._factors(name, facts))
        return made

    def read(self) -> Mapping[str, Tensor]:
        """Every tensor under the original's name; those of transformed layers in float32.

        Raises:
            UserError: The files are of a later version.
        """
        source = self.source
        version = source.config["quantization_config"]["version"]
        if version > VERSION:
            raise UserError(
                f"{source.label} is of version {version} of the format; this layerwise reads up "
                f"to {VERSION}.",
                "pip install --upgrade layerwise.",
            )
        packed = {name for layer in self._layers for name in self._parts.get(layer, ())}
        state = {name: source.read(name) for name in source.tensors if name not in packed}
        for name, facts in self._layers.items():
            matrix = self._decoded(name, facts)
            laid = matrix.T.contiguous() if facts["transposed"] else matrix
            state[facts["tensor"]] = laid.reshape(facts["shape"])
        return state

    @property
    def _layers(self) -> Mapping[str, Mapping[str, Any]]:
        return self.source.config["quantization_config"]["layers"]

    @functools.cached_property
    def _parts(self) -> Mapping[str, Sequence[str]]:
        """The names of what is stored for each layer in place of its weight."""
        made: dict[str, list[str]] = {}
        for name in self.source.tensors:
            layer, _, part = name.rpartition(".")
            if part not in ("weight", "bias"):
                made.setdefault(layer, []).append(name)
        return made

    def _decoded(self, name: str, facts: Mapping[str, Any]) -> Float[Tensor, "out in"]:
        """A layer's matrix."""
        source, (rows, width) = self.source, _sides(facts)
        if facts["bits"] is not None:
            base = self._coded(name, facts).grid_values()
        elif facts["sparse"]:
            values = source.read(f"{name}.values").float()[0]
            kept = unpack_bits(source.read(f"{name}.mask"), width)
            base = torch.zeros(rows, width).masked_scatter(kept, values)
        else:
            tensor = source.read(facts["tensor"]).float()
            base = tensor.T if facts["transposed"] else tensor.reshape(rows, width)
        if (sides := self._factors(name, facts)) is not None:
            base = base + sides[0] @ sides[1]
        return base

    def _coded(self, name: str, facts: Mapping[str, Any]) -> Coded:
        """A layer's codes; pruned weights have that of 0.0."""
        rows, width = _sides(facts)
        parts = {full.rpartition(".")[2]: self.source.read(full) for full in self._parts[name]}
        if "method" in facts:
            stores = catalogue.get(f"quantize/{facts['method']}").stores
            return stores.read(parts, rows, width, facts["told"])
        told = {told: facts[told] for told in ("bits", "group", "symmetric")}
        told["codes"] = facts.get("codes") or "integer"
        if not facts["sparse"]:
            return Quantized.read(parts, rows, width, told)
        kept = unpack_bits(parts["mask"], width)
        held, packed = int(kept.sum()), parts["codes"]
        floats = packed.dtype == torch.uint8
        codes = packed[:, :held].int() if floats else unpack(packed, told["bits"], held)
        # The grids, over codes of zeros; then the survivors'.
        dtype, shape = Quantized.layout(rows, width, told)["codes"]
        parts["codes"] = torch.zeros(shape, dtype=dtype)
        grids = Quantized.read(parts, rows, width, told)
        zeros = spread(grids.zero, grids.group, width)
        return replace(grids, codes=zeros.masked_scatter(kept, codes[0]))

    def _factors(self, name: str, facts: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
        """Both sides of a layer's correction, float32."""
        if not facts["rank"]:
            return None
        return self.source.read(f"{name}.left").float(), self.source.read(f"{name}.right").float()


def _version(plan: LayerPlan) -> int:
    """The first version that can say what a layer is."""
    return VERSION if plan.rounding else _VERSIONS.get(plan.codes, VERSION)


def _sides(facts: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and width of a layer's matrix."""
    rows, *inputs = reversed(facts["shape"]) if facts["transposed"] else facts["shape"]
    return rows, math.prod(inputs)


def _answer(coded: Coded, sides: tuple[Tensor, Tensor] | None) -> Answer:
    """What codes answer, and a correction of inputs that are not rounded."""
    if sides is None:
        return coded.answer
    left, right = sides[0].float(), sides[1].float()

    def answer(inputs: Tensor) -> Tensor:
        correction = inputs @ right.to(inputs.device).T @ left.to(inputs.device).T
        return coded.answer(inputs) + correction

    return answer


def _capacity(layer: Layer, plan: LayerPlan) -> int:
    """Room for survivors.  Pruners round a density per layer or per row: at most one more a row."""
    return min(layer.count, int(plan.density * layer.count) + layer.rows)


def _survivors(matrix: Tensor, kept: Tensor, capacity: int) -> Tensor:
    """The kept entries, row after row, and zeros up to the capacity; (1, capacity)."""
    chosen = matrix[kept]
    assert len(chosen) <= capacity, f"{len(chosen)} survivors, room for {capacity}"
    return functional.pad(chosen, (0, capacity - len(chosen)))[None]
