"""layerwise's own format: whatever a plan asks for, at the size it really has.

Plain safetensors.  Codes, scales and zero points; for pruned layers a bitmask and the survivors;
low-rank corrections as two factors.  `docs/format.md` describes every tensor; `layerwise.load`
makes a transformers model of it.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from layerwise.core.apply import Transformed
from layerwise.core.checkpoint import Source, TensorInfo
from layerwise.core.errors import UserError
from layerwise.core.format import Format
from layerwise.core.packing import BYTE, pack, pack_bits, unpack, unpack_bits, words
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.results import SCALE_DTYPE, Quantized, float8_points
from layerwise.core.structure import Layer, Structure
from layerwise.export._adapter import corrected, factors

NAME = "layerwise"
VERSION = 2  # the first in which codes may be floats; files without them still say 1


class Layerwise(Format):
    """Packed codes, bitmasks with their survivors, and low-rank factors, mixed per layer."""

    # A loader that does not know the format finds no weights, instead of loading noise.
    stem = NAME
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
            groups = -(-layer.width // (plan.group or layer.width))
            rows, width = (1, _capacity(layer, plan)) if sparse else (layer.rows, layer.width)
            if plan.codes == "float8":
                made.append(TensorInfo(f"{name}.codes", torch.uint8, (rows, width)))
            else:
                shape = (rows, words(width, plan.bits))
                made.append(TensorInfo(f"{name}.codes", torch.int32, shape))
            made.append(TensorInfo(f"{name}.scale", SCALE_DTYPE, (layer.rows, groups)))
            if not plan.symmetric:
                shape = (layer.rows, words(groups, plan.bits))
                made.append(TensorInfo(f"{name}.zero", torch.int32, shape))
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
            codes = quantized.codes
            if done.kept is not None:
                codes = _survivors(codes, done.kept, _capacity(done.layer, plan))
            floats = quantized.points is not None
            made[f"{name}.codes"] = codes.contiguous() if floats else pack(codes, quantized.bits)
            made[f"{name}.scale"] = quantized.scale
            if not quantized.symmetric:
                made[f"{name}.zero"] = pack(quantized.zero, quantized.bits)
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
            }
            for name, layer in plan.layers.items()
            if layer.steps
        }
        floats = any(facts["codes"] == "float8" for facts in layers.values())
        stored = {"quant_method": NAME, "version": VERSION if floats else 1, "layers": layers}
        return {"quantization_config": stored}

    def read(self) -> Mapping[str, Tensor]:
        """Every tensor under the original's name; those of transformed layers in float32.

        Raises:
            UserError: The files are of a later version.
        """
        source = self.source
        stored = source.config["quantization_config"]
        if stored["version"] > VERSION:
            raise UserError(
                f"{source.label} is of version {stored['version']} of the format; this layerwise "
                f"reads up to {VERSION}.",
                "pip install --upgrade layerwise.",
            )
        layers: Mapping[str, Mapping[str, Any]] = stored["layers"]
        parts = ("mask", "codes", "scale", "zero", "values", "left", "right")
        packed = {f"{name}.{part}" for name in layers for part in parts}
        state = {name: source.read(name) for name in source.tensors if name not in packed}
        for name, facts in layers.items():
            matrix = _decoded(source, name, facts)
            laid = matrix.T.contiguous() if facts["transposed"] else matrix
            state[facts["tensor"]] = laid.reshape(facts["shape"])
        return state


def _decoded(source: Source, name: str, facts: Mapping[str, Any]) -> Float[Tensor, "out in"]:
    rows, *inputs = reversed(facts["shape"]) if facts["transposed"] else facts["shape"]
    width, bits = math.prod(inputs), facts["bits"]
    kept = None
    if facts["sparse"]:
        kept = unpack_bits(source.read(f"{name}.mask"), width)
    if bits is not None:
        group = int(facts["group"] or width)
        scale = source.read(f"{name}.scale")
        zero = _zero(source, name, facts, scale)
        floats = facts.get("codes") == "float8"
        codes = source.read(f"{name}.codes")
        held = width if kept is None else int(kept.sum())
        codes = codes[:, :held].int() if floats else unpack(codes, bits, held)
        if kept is not None:
            zeros = zero.repeat_interleave(group, dim=1)[:, :width]
            codes = zeros.masked_scatter(kept, codes[0])
        points = float8_points() if floats else None
        base = Quantized(codes, scale, zero, bits, group, points=points).grid_values()
    elif kept is not None:
        values = source.read(f"{name}.values").float()[0]
        base = torch.zeros(rows, width).masked_scatter(kept, values)
    else:
        tensor = source.read(facts["tensor"]).float()
        base = tensor.T if facts["transposed"] else tensor.reshape(rows, width)
    if facts["rank"]:
        left, right = (source.read(f"{name}.{side}").float() for side in ("left", "right"))
        base = base + left @ right
    return base


def _zero(source: Source, name: str, facts: Mapping[str, Any], scale: Tensor) -> Tensor:
    bits = int(facts["bits"])
    if facts["symmetric"]:
        middle = 0 if facts.get("codes") == "float8" else 2 ** (bits - 1)
        return torch.full(scale.shape, middle, dtype=torch.int32)
    return unpack(source.read(f"{name}.zero"), bits, scale.shape[1])


def _capacity(layer: Layer, plan: LayerPlan) -> int:
    """Room for survivors.  Pruners round a density per layer or per row: at most one more a row."""
    return min(layer.count, int(plan.density * layer.count) + layer.rows)


def _survivors(matrix: Tensor, kept: Tensor, capacity: int) -> Tensor:
    """The kept entries, row after row, and zeros up to the capacity; (1, capacity)."""
    chosen = matrix[kept]
    assert len(chosen) <= capacity, f"{len(chosen)} survivors, room for {capacity}"
    return functional.pad(chosen, (0, capacity - len(chosen)))[None]
