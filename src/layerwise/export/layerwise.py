"""layerwise's own format: whatever a plan asks for, at the size it really has.

Plain safetensors.  Codes, scales and zero points; for pruned layers a bitmask and the survivors;
low-rank corrections as two factors.  `docs/format.md` describes every tensor; `layerwise.load`
makes a transformers model of it.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from layerwise.core.apply import Transformed
from layerwise.core.checkpoint import Source, TensorInfo
from layerwise.core.errors import UserError
from layerwise.core.format import Format
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.results import SCALE_DTYPE, Quantized
from layerwise.core.structure import Layer, Structure
from layerwise.export._packing import pack, unpack, words

NAME = "layerwise"
VERSION = 1
_BYTE = 8  # bits


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
            shape = (layer.rows, -(-layer.width // _BYTE))
            made.append(TensorInfo(f"{name}.mask", torch.uint8, shape))
        if plan.bits is not None:
            groups = -(-layer.width // (plan.group or layer.width))
            rows, width = (1, _capacity(layer, plan)) if sparse else (layer.rows, layer.width)
            made.append(TensorInfo(f"{name}.codes", torch.int32, (rows, words(width, plan.bits))))
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
            made[f"{name}.codes"] = pack(codes, quantized.bits)
            made[f"{name}.scale"] = quantized.scale
            if not quantized.symmetric:
                made[f"{name}.zero"] = pack(quantized.zero, quantized.bits)
        elif done.kept is not None:
            values = _survivors(done.base, done.kept, _capacity(done.layer, plan))
            made[f"{name}.values"] = values.to(info.dtype)
        else:
            made[info.name] = done.layer.store(done.base.to(info.dtype), (-1, *info.shape[1:]))
        if (factors := _factors(done, info.dtype)) is not None:
            made[f"{name}.left"], made[f"{name}.right"] = factors
        return made

    def restored(self, done: Transformed, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The codes' own values, or the stored ones, and the stored factors' product."""
        quantized = done.quantized
        base = done.base.to(dtype).float() if quantized is None else quantized.grid_values()
        factors = _factors(done, dtype)
        return base if factors is None else base + factors[0].float() @ factors[1].float()

    def config(self, plan: Plan, found: Structure) -> Mapping[str, Any]:
        """What `read` needs."""
        layers = {
            name: {
                "tensor": found.layers[name].tensor,
                "shape": list(self.source.tensors[found.layers[name].tensor].shape),
                "transposed": found.layers[name].layout == "conv1d",
                "bits": layer.bits,
                "group": layer.group,
                "symmetric": layer.symmetric,
                "sparse": layer.density < 1,
                "rank": layer.rank,
            }
            for name, layer in plan.layers.items()
            if layer.steps
        }
        stored = {"quant_method": NAME, "version": VERSION, "layers": layers}
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
        codes = source.read(f"{name}.codes")
        if kept is None:
            codes = unpack(codes, bits, width)
        else:
            survivors = unpack(codes, bits, int(kept.sum()))[0]
            zeros = zero.repeat_interleave(group, dim=1)[:, :width]
            codes = zeros.masked_scatter(kept, survivors)
        base = Quantized(codes, scale, zero, bits, group).grid_values()
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
        return torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.int32)
    return unpack(source.read(f"{name}.zero"), bits, scale.shape[1])


def pack_bits(mask: Bool[Tensor, "rows width"]) -> Tensor:
    """Eight entries to a byte, the first in its lowest bit; (rows, ceil(width / 8)), uint8."""
    padded = functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % _BYTE))
    lanes = padded.reshape(len(mask), -1, _BYTE)
    weights = 2 ** torch.arange(_BYTE, dtype=torch.uint8)
    return (lanes * weights).sum(dim=-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, width: int) -> Bool[Tensor, "rows width"]:
    """What `pack_bits` packed."""
    bits = packed[..., None] >> torch.arange(_BYTE, dtype=torch.uint8) & 1
    return bits.reshape(len(packed), -1)[:, :width].bool()


def _capacity(layer: Layer, plan: LayerPlan) -> int:
    """Room for survivors.  Pruners round a density per layer or per row: at most one more a row."""
    return min(layer.count, int(plan.density * layer.count) + layer.rows)


def _survivors(matrix: Tensor, kept: Tensor, capacity: int) -> Tensor:
    """The kept entries, row after row, and zeros up to the capacity; (1, capacity)."""
    chosen = matrix[kept]
    assert len(chosen) <= capacity, f"{len(chosen)} survivors, room for {capacity}"
    return functional.pad(chosen, (0, capacity - len(chosen)))[None]


def _factors(done: Transformed, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """The correction as stored: its right side takes the scales that went into the feeder."""
    if done.low_rank is None:
        return None
    scale = done.input_scale
    right = done.low_rank.right if scale is None else done.low_rank.right * scale
    return done.low_rank.left.to(dtype).contiguous(), right.to(dtype).contiguous()
