"""The compressed-tensors format: what vLLM and transformers load.

Integer codes are `pack-quantized`: packed densely, least significant bit first, into int32 words
along the inputs; zero points along the outputs.  Codes that are 8-bit floats are
`float-quantized`: a tensor of float8_e4m3fn.  Layers of 8 bits with one grid a row whose inputs
are rounded to whole numbers of 8 bits too are `int-quantized`, one int8 per code: what vLLM takes
for them, and refuses for those whose weights alone are codes.  A file with several of these says
`mixed-precision`.

Rounded inputs are `input_activations`; one scale for all tokens is stored as `input_scale`.  For a
scale of each token the package divides the largest magnitude by 127.5 (7.5), so that is what the
proof and the comparison do; vLLM's kernels divide by 127.

https://github.com/vllm-project/compressed-tensors (0.20) is what the tests read it back with;
before 0.18 it packed widths that do not divide 32, such as 3, with whole codes to a word, and so
cannot read these files.

Low-rank corrections lie beside the files as a PEFT adapter: see `_adapter.py`.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.activation import SCHEMES, Activation, Scheme, kind, static
from layerwise.core.catalogue import Codes
from layerwise.core.errors import UserError
from layerwise.core.format import Format
from layerwise.core.keeping.staging import Arrangement
from layerwise.core.packing import pack, words
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.reading.checkpoint import TensorInfo
from layerwise.core.reading.structure import Layer, Structure
from layerwise.core.results import FLOAT8_DTYPE, SCALE_DTYPE
from layerwise.core.running.apply import Transformed
from layerwise.core.running.products import Answer
from layerwise.export._adapter import (
    adapter_files,
    adapter_problem,
    adapter_tensors,
    arrange_beside,
    corrected,
    encode_adapter,
)

_WIDEST = 8
_CODES = frozenset[Codes]({"integer", "float8"})
_PACKED, _FLOAT, _BYTES = "pack-quantized", "float-quantized", "int-quantized"
_MIXED = "mixed-precision"


class _Grid(NamedTuple):
    """What layers of one group in the configuration have in common."""

    bits: int
    group: int
    symmetric: bool
    float8: bool
    rounding: Scheme | Literal[""]

    @classmethod
    def of(cls, plan: LayerPlan) -> "_Grid":
        assert plan.bits is not None
        return cls(plan.bits, plan.group, plan.symmetric, plan.codes == "float8", plan.rounding)

    @property
    def format(self) -> str:
        if self.float8:
            return _FLOAT
        whole = self.rounding and kind(self.rounding) == "int8"
        return _BYTES if whole and self.bits == _WIDEST and not self.group else _PACKED


class _AsLoaded(Activation):
    """Inputs as the package rounds them."""

    @property
    def reach(self) -> float:
        """What a step of 1 reaches: half of all there is between the ends of its codes."""
        return super().reach + 0.5 if self.whole else super().reach


class CompressedTensors(Format):
    """Codes with 16-bit scales, mixed per layer; other layers in their own dtype."""

    codes = _CODES
    activations = frozenset(SCHEMES)
    packages = ("compressed_tensors",)
    directory = True
    adapts = True
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
        """Codes and scales; of packed codes the shape, too; the adapter's of a correction."""
        adapter = adapter_tensors(layer, plan, info)
        if not plan.coded or plan.bits is None:
            return [info, *adapter]
        groups = -(-layer.width // (plan.group or layer.width))
        scale = TensorInfo(f"{layer.name}.weight_scale", SCALE_DTYPE, (layer.rows, groups))
        if static(plan.rounding):
            adapter.insert(0, TensorInfo(f"{layer.name}.input_scale", SCALE_DTYPE, (1,)))
        if (format := _Grid.of(plan).format) != _PACKED:
            dtype = FLOAT8_DTYPE if format == _FLOAT else torch.int8
            shape = (layer.rows, layer.width)
            return [TensorInfo(f"{layer.name}.weight", dtype, shape), scale, *adapter]
        packed = (layer.rows, words(layer.width, plan.bits))
        return [
            TensorInfo(f"{layer.name}.weight_packed", torch.int32, packed),
            scale,
            TensorInfo(f"{layer.name}.weight_shape", torch.int64, (2,)),
            *adapter,
        ]

    def encode(self, done: Transformed, info: TensorInfo) -> dict[str, Tensor]:
        """Pack a layer's codes, or those of some rows."""
        quantized, name = done.grid, done.layer.name
        made = encode_adapter(done, info.dtype)
        if quantized is None:
            stored = done.layer.store(done.stored.to(info.dtype), (-1, *info.shape[1:]))
            return {info.name: stored, **made}
        made[f"{name}.weight_scale"] = quantized.scale
        if done.activation is not None and done.activation.scale is not None:
            made[f"{name}.input_scale"] = done.activation.scale.to(SCALE_DTYPE)
        format = _Grid.of(done.plan).format
        if format == _FLOAT:
            made[f"{name}.weight"] = quantized.codes.contiguous().view(FLOAT8_DTYPE)
        elif format == _BYTES:
            middle = 2 ** (quantized.bits - 1)
            made[f"{name}.weight"] = (quantized.codes.int() - middle).to(torch.int8)
        else:
            made[f"{name}.weight_packed"] = pack(quantized.codes, quantized.bits)
        return made

    def arrange(self, tensors: Iterable[TensorInfo]) -> Arrangement:
        """Files with room for all tensors, the adapter's in one of their own."""
        return arrange_beside(tensors, self.stem)

    def files(self, plan: Plan, found: Structure) -> Mapping[str, bytes]:
        """What says how the adapter is to be read."""
        return adapter_files(plan)

    def constants(self, layer: Layer, plan: LayerPlan) -> dict[str, Tensor]:
        """The shape, which packed codes no longer tell."""
        if not plan.coded or plan.bits is None or _Grid.of(plan).format != _PACKED:
            return {}
        return {f"{layer.name}.weight_shape": torch.tensor([layer.rows, layer.width])}

    def restored(self, done: Transformed, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The codes' own values; a loader that computes in float32 rounds those of experts only."""
        if done.grid is None:
            return corrected(done, done.stored.to(dtype).float(), dtype)
        values = done.grid.grid_values()
        # transformers joins a block's experts to one tensor; of packed codes it holds that in the
        # scales' dtype, of floats in the one it was asked for.
        if "experts." in done.layer.name and done.grid.points is None:
            return values.to(SCALE_DTYPE).float()
        return corrected(done, values, dtype)

    def answer(self, done: Transformed, dtype: torch.dtype) -> Answer | None:
        """The product with inputs as the loader rounds them."""
        if done.activation is None or done.grid is None:
            return None
        scale = done.activation.scale
        stored = None if scale is None else scale.to(SCALE_DTYPE).float()
        rounding, matrix = _AsLoaded(done.activation.scheme, stored), done.grid.grid_values()
        correction = self.restored(done, dtype) - matrix if done.plan.rank else None

        def answer(inputs: Tensor) -> Tensor:
            made = rounding.rounded(inputs) @ matrix.to(inputs.device).T
            return made if correction is None else made + inputs @ correction.to(inputs.device).T

        return answer

    @classmethod
    def grid(cls, bits: int) -> tuple[int | None, bool | None]:
        """Symmetric: see `_problem`."""
        return None, True

    def config(self, plan: Plan, found: Structure) -> Mapping[str, Any]:
        """`quantization_config`: one group of layers per grid, and what is ignored."""
        grids: dict[_Grid, list[str]] = {}
        ignored = [_module(name) for name in found.left if _is_matrix_name(name)]
        for name, layer in plan.layers.items():
            if not layer.coded or layer.bits is None:
                ignored.append(name)
            else:
                grids.setdefault(_Grid.of(layer), []).append(name)
        if not grids:
            return {}
        formats = {grid.format for grid in grids}
        groups = {
            f"group_{number}": _scheme(grid, names)
            for number, (grid, names) in enumerate(grids.items())
        }
        return {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": formats.pop() if len(formats) == 1 else _MIXED,
                "quantization_status": "compressed",
                "config_groups": groups,
                "ignore": sorted({*ignored, "lm_head"}),
                "kv_cache_scheme": None,
                "global_compression_ratio": None,
            }
        }


def _problem(layer: Layer, plan: LayerPlan) -> str:
    """Why the format has no place for a layer; "" if it has."""
    if problem := adapter_problem(layer, plan):
        return problem
    if not plan.coded or plan.bits is None:
        return ""
    rules = (
        (plan.codes not in _CODES, f"the codes of {plan.method}"),
        (plan.bits > _WIDEST, f"{plan.bits} bits; it goes up to {_WIDEST}"),
        (
            bool(plan.rounding) and "experts." in layer.name,
            "its loader does not round the inputs of experts",
        ),
        (layer.layout != "linear", f"it is stored as a {layer.layout}, not as a Linear"),
        (layer.expert is not None, "its experts lie in one 3-D tensor"),
        (
            # Version 0.20 lays a packed zero point out with the shape of an unpacked one, so
            # from_pretrained refuses every asymmetric pack-quantized checkpoint.
            not plan.symmetric,
            "its loader refuses packed zero points; use a symmetric grid (--symmetric)",
        ),
    )
    return next((problem for applies, problem in rules if applies), "")


def _scheme(grid: _Grid, targets: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": grid.bits,
        "type": "float" if grid.float8 else "int",
        "symmetric": grid.symmetric,
        "strategy": "group" if grid.group else "channel",
        "group_size": grid.group or None,
        "dynamic": False,
        "actorder": None,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": _inputs(grid.rounding) if grid.rounding else None,
        "output_activations": None,
        "format": grid.format,
    }


def _inputs(rounding: Scheme) -> dict[str, Any]:
    return {
        "num_bits": 4 if kind(rounding) == "int4" else 8,
        "type": "float" if kind(rounding) == "fp8" else "int",
        "symmetric": True,
        "strategy": "tensor" if static(rounding) else "token",
        "dynamic": not static(rounding),
    }


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _is_matrix_name(name: str) -> bool:
    return name.endswith(".weight") and "norm" not in name
