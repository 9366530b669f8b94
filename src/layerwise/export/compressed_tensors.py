"""The compressed-tensors format, `pack-quantized`: what vLLM and transformers load.

Codes are packed densely, least significant bit first, into int32 words along the inputs; zero
points along the outputs.  https://github.com/vllm-project/compressed-tensors (0.20) is what the
tests read it back with; before 0.18 it packed widths that do not divide 32, such as 3, with whole
codes to a word, and so cannot read these files.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.apply import Transformed
from layerwise.core.checkpoint import TensorInfo
from layerwise.core.errors import UserError
from layerwise.core.format import Format
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.results import SCALE_DTYPE
from layerwise.core.structure import Layer, Structure
from layerwise.export._packing import pack, words

_WIDEST = 8


class CompressedTensors(Format):
    """Integer codes with 16-bit scales, mixed per layer; other layers in their own dtype."""

    packages = ("compressed_tensors",)
    packs = True
    unpacking = 16.0

    def check(self, plan: Plan, found: Structure) -> None:
        """Refuse what the format has no place for."""
        for name, layer_plan in plan.layers.items():
            if problem := _problem(found.layers[name], layer_plan):
                raise UserError(
                    f"compressed-tensors cannot hold {name}: {problem}.",
                    "Change that layer's plan, or write --format dense.",
                )

    def tensors(self, layer: Layer, plan: LayerPlan, info: TensorInfo) -> list[TensorInfo]:
        """Codes, scales and the shape; zero points unless symmetric."""
        if plan.bits is None:
            return [info]
        groups = -(-layer.width // (plan.group or layer.width))
        made = [
            TensorInfo(
                f"{layer.name}.weight_packed",
                torch.int32,
                (layer.rows, words(layer.width, plan.bits)),
            ),
            TensorInfo(f"{layer.name}.weight_scale", SCALE_DTYPE, (layer.rows, groups)),
            TensorInfo(f"{layer.name}.weight_shape", torch.int64, (2,)),
        ]
        if not plan.symmetric:
            shape = (words(layer.rows, plan.bits), groups)
            made.append(TensorInfo(f"{layer.name}.weight_zero_point", torch.int32, shape))
        return made

    def encode(self, done: Transformed, info: TensorInfo) -> dict[str, Tensor]:
        """Pack a layer's codes, or rows of them (32 at a time, so that zero points fill words)."""
        quantized, name = done.quantized, done.layer.name
        if quantized is None:
            return {info.name: done.layer.store(done.weight.to(info.dtype), (-1, *info.shape[1:]))}
        made = {
            f"{name}.weight_packed": pack(quantized.codes, quantized.bits),
            f"{name}.weight_scale": quantized.scale,
        }
        if not quantized.symmetric:
            packed = pack(quantized.zero.T, quantized.bits)
            made[f"{name}.weight_zero_point"] = packed.T.contiguous()
        return made

    def constants(self, layer: Layer, plan: LayerPlan) -> dict[str, Tensor]:
        """The shape, which packed codes no longer tell."""
        if plan.bits is None:
            return {}
        return {f"{layer.name}.weight_shape": torch.tensor([layer.rows, layer.width])}

    def restored(self, done: Transformed, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The codes' own values; a loader that computes in float32 rounds those of experts only."""
        if done.quantized is None:
            return done.weight.to(dtype).float()
        values = done.quantized.grid_values()
        # transformers joins a block's experts to one tensor, which it holds in the scales' dtype.
        return values.to(SCALE_DTYPE).float() if "experts." in done.layer.name else values

    @classmethod
    def grid(cls, bits: int) -> tuple[int | None, bool | None]:
        """Symmetric: see `_problem`."""
        return None, True

    def config(self, plan: Plan, found: Structure) -> Mapping[str, Any]:
        """`quantization_config`: one group of layers per grid, and what is ignored."""
        grids: dict[tuple[int, int, bool], list[str]] = {}
        ignored = [_module(name) for name in found.left if _is_matrix_name(name)]
        for name, layer in plan.layers.items():
            if layer.bits is None:
                ignored.append(name)
            else:
                grids.setdefault((layer.bits, layer.group, layer.symmetric), []).append(name)
        groups = {
            f"group_{number}": _scheme(grid, names)
            for number, (grid, names) in enumerate(grids.items())
        }
        return {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "quantization_status": "compressed",
                "config_groups": groups,
                "ignore": sorted({*ignored, "lm_head"}),
                "kv_cache_scheme": None,
                "global_compression_ratio": None,
            }
        }


def _problem(layer: Layer, plan: LayerPlan) -> str:
    """Why the format has no place for a layer; "" if it has."""
    if plan.bits is None:
        return "a low-rank correction without codes" if plan.rank else ""
    rules = (
        (plan.bits > _WIDEST, f"{plan.bits} bits; it goes up to {_WIDEST}"),
        (layer.layout != "linear", f"it is stored as a {layer.layout}, not as a Linear"),
        (layer.expert is not None, "its experts lie in one 3-D tensor"),
        (plan.rank > 0, "it has no place for a low-rank correction"),
        (
            # Version 0.20 lays a packed zero point out with the shape of an unpacked one, so
            # from_pretrained refuses every asymmetric pack-quantized checkpoint.
            not plan.symmetric,
            "its loader refuses packed zero points; use a symmetric grid (--symmetric)",
        ),
    )
    return next((problem for applies, problem in rules if applies), "")


def _scheme(grid: tuple[int, int, bool], targets: list[str]) -> dict[str, Any]:
    bits, group, symmetric = grid
    weights: dict[str, Any] = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "dynamic": False,
        "actorder": None,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _is_matrix_name(name: str) -> bool:
    return name.endswith(".weight") and "norm" not in name
