"""What each server loads: its rules as data, and the refusal of a plan that breaks one.

A format says what can be written; a server may load less of it.  Each rule names where it was
found, for a server's next version may have another.  `docs/servers.md` is made from this file.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from layerwise.core.catalogue import Codes
from layerwise.core.errors import UserError
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.reading.structure import Layer, Structure

# Codes, their bits, and the groups they may have.
Weights = tuple[Codes, int, Sequence[int]]
# Layers that must have one grid: all of a model, all experts of a block, or none but those that
# every plan treats alike (q/k/v, gate/up).
Alike = Literal["model", "experts", "fused"]


@dataclass(frozen=True, slots=True)
class Rules:
    """What a server loads of one format; None is whatever the format holds.

    Attributes:
        widths: Bits of a code, by what codes stand for; codes that are missing are not loaded.
        groups: Inputs that share a scale, by what codes stand for; 0 is the whole row.
        symmetric: Only grids without zero points.
        rank: Most columns of a low-rank correction.
        inputs: Weights whose inputs may be rounded, by how; inputs rounded otherwise are not
            loaded.
        alike: Layers that must have one grid.
        sources: Where each rule was found, by the rule's name.
    """

    widths: Mapping[Codes, Sequence[int]] | None = None
    groups: Mapping[Codes, Sequence[int]] | None = None
    symmetric: bool = False
    rank: int | None = None
    inputs: Mapping[str, Sequence[Weights]] | None = None
    alike: Alike = "fused"
    sources: Mapping[str, str] = field(default_factory=dict[str, str])

    def together(self, layer: Layer) -> str:
        """The same for layers that must have one grid."""
        if self.alike == "model":
            return ""
        expert = "experts." in layer.name or layer.expert is not None
        alike = self.alike == "experts" and expert
        return f"{layer.block}: experts" if alike else layer.fused


_VLLM = "vllm/model_executor/layers/quantization"
_VLLM_RANK = "vllm/config/lora.py, MaxLoRARanks: up to 512 (serve with --max-lora-rank)"
_VLLM_GROUPS = f"{_VLLM}/utils/marlin_utils.py, MARLIN_SUPPORTED_GROUP_SIZES"

# The first format of a server is its default.
SERVERS: Mapping[str, Mapping[str, Rules]] = MappingProxyType(
    {
        "vllm": {
            "compressed-tensors": Rules(
                widths={"integer": (4, 8), "float8": (8,)},
                groups={"integer": (0, 32, 64, 128), "float8": (0,)},
                symmetric=True,
                rank=512,
                inputs={
                    "int8": (("integer", 8, (0,)), ("integer", 4, (0, 32, 64, 128))),
                    "int8-static": (("integer", 8, (0,)),),
                    "fp8": (("float8", 8, (0,)), ("integer", 4, (128,))),
                    "fp8-static": (("float8", 8, (0,)),),
                },
                alike="experts",
                sources={
                    "inputs": f"{_VLLM}/compressed_tensors/compressed_tensors.py, "
                    "_is_static_tensor_w8a8, _is_dynamic_token_w8a8, _is_dynamic_token_w4a8_int, "
                    "_is_fp8_w8a8, _is_fp8_w4a8; groups of 128 for the last",
                    "widths": f"{_VLLM}/compressed_tensors/schemes/compressed_tensors_wNa16.py, "
                    "WNA16_SUPPORTED_BITS of the Marlin kernels; compressed_tensors_w8a16_fp8.py",
                    "groups": f"{_VLLM_GROUPS}; compressed_tensors_w8a16_fp8.py, "
                    "SUPPORTED_STRATEGIES: a channel or a tensor",
                    "symmetric": "the format; compressed_tensors.py, _is_fp8_w8a16",
                    "rank": _VLLM_RANK,
                    "alike": f"{_VLLM}/compressed_tensors/compressed_tensors_moe.py: one scheme "
                    "for a block's experts",
                },
            ),
            "gptq": Rules(
                widths={"integer": (4, 8)},
                groups={"integer": (0, 32, 64, 128)},
                symmetric=True,
                rank=512,
                sources={
                    "widths": f"{_VLLM}/auto_gptq.py (gptq_marlin.py before), TYPE_MAP",
                    "groups": _VLLM_GROUPS,
                    "symmetric": f"{_VLLM}/auto_gptq.py (gptq_marlin.py before), TYPE_MAP",
                    "rank": _VLLM_RANK,
                },
            ),
            "dense": Rules(),
        },
        "transformers": {
            "compressed-tensors": Rules(
                sources={"widths": "measured: whatever the format holds is loaded and compared"}
            ),
            "gptq": Rules(
                groups={"integer": (32, 64, 128)},
                alike="model",
                sources={
                    "groups": "measured: what GPTQModel 7.7 chooses for 4 bits on a processor "
                    "(TorchAtenLinear) fails in any other group but 256",
                    "alike": "optimum/gptq/quantizer.py, _replace_by_quant_layers: one grid for "
                    "all layers, `dynamic` is not read",
                },
            ),
            "dense": Rules(),
        },
        "llama.cpp": {
            "gguf": Rules(
                widths={"integer": (4, 5, 6, 8)},
                rank=0,
                sources={
                    "widths": "ggml: Q4_0, Q4_1, Q5_0, Q6_K, Q8_0; the format says which groups",
                    "rank": "convert_lora_to_gguf.py: adapters are GGUF files of their own",
                },
            ),
        },
    }
)


def default_format(server: str) -> str:
    """The format that a server's users get if they name none.

    Raises:
        UserError: There is no such server.
    """
    return next(iter(_formats(server)))


def allowed(server: str, format: str) -> Rules:
    """What a server loads of a format; anything, for no server ("").

    Raises:
        UserError: There is no such server, or it does not load that format.
    """
    if not server:
        return Rules()
    loaded = _formats(server)
    if format not in loaded:
        raise UserError(
            f"{server} does not load the format {format}.",
            f"It loads {', '.join(loaded)}; leave out --format for {next(iter(loaded))}.",
        )
    return loaded[format]


def check_level(server: str, format: str, level: LayerPlan, whose: str = "") -> None:
    """Refuse a width, group, symmetry or rank that a server does not load.

    Args:
        server: Its name; "" loads everything.
        format: How the output is stored.
        level: What a layer would get; a group that is not chosen yet is one the server has.
        whose: The layer, if it is that of one.

    Raises:
        UserError: It names the rule and what the server loads.
    """
    rules = allowed(server, format)
    refuse = functools.partial(_refusal, f"{whose}: {server}" if whose else server, format)
    if rules.rank is not None and level.rank > rules.rank:
        most = f"Ranks go up to {rules.rank}." if rules.rank else "It loads none; leave out --rank."
        raise refuse(f"a correction of rank {level.rank}", most)
    if level.bits is None or level.codes is None:
        return
    if rules.widths is not None:
        if level.codes not in rules.widths:
            raise refuse(f"{level.codes} codes (quantize/{level.method})", "Use another --method.")
        if level.bits not in (widths := rules.widths[level.codes]):
            raise refuse(f"{level.bits} bits", f"It loads {_listed(widths)} bits.")
    if rules.symmetric and not level.symmetric:
        raise refuse("zero points", "Add --symmetric, or write `symmetric: true`.")
    if rules.groups is not None and level.group not in (groups := rules.groups[level.codes]):
        raise refuse(
            f"groups of {level.group}" if level.group else "whole rows as groups (0)",
            f"It loads {_listed(groups)}{' (0: a row)' * (0 in groups)}.",
        )
    able = None if rules.inputs is None else rules.inputs.get(level.rounding, ())
    if level.rounding and able is not None and not any(_are(level, weights) for weights in able):
        raise refuse(
            f"inputs rounded to {level.rounding} beside {_said(level)}",
            f"Beside them it takes {'; '.join(map(_weights, able)) or 'nothing'}.",
        )


def _refusal(server: str, format: str, given: str, instead: str) -> UserError:
    return UserError(f"{server} does not load {given} in {format}.", instead)


def check_server(plan: Plan, found: Structure) -> None:
    """Refuse a plan that its server would not load.

    Raises:
        UserError: It names the layer, the rule and what the server loads.
    """
    rules = allowed(plan.server, plan.format)
    first: dict[str, str] = {}
    for name, layer_plan in plan.layers.items():
        check_level(plan.server, plan.format, layer_plan, name)
        if rules.alike == "model" and layer_plan.bits is None:
            continue  # a layer may be left out of the one grid
        other = first.setdefault(rules.together(found.layers[name]), name)
        if _grid(layer_plan) != _grid(plan.layers[other]):
            raise UserError(
                f"{plan.server} wants one grid in {_WHOSE[rules.alike]} of a {plan.format} file, "
                f"but {name} has {_said(layer_plan)} and {other} {_said(plan.layers[other])}.",
                "Give them the same bits, group and method.",
            )


_WHOSE: Mapping[Alike, str] = {
    "model": "all layers",
    "experts": "the experts of a block",
    "fused": "layers that it fuses",
}


def _grid(plan: LayerPlan) -> tuple[object, ...]:
    return (plan.codes, plan.bits) + ((plan.group, plan.symmetric) if plan.bits else ())


def _said(plan: LayerPlan) -> str:
    if plan.bits is None:
        return "no codes"
    floats = "floats of " if plan.codes == "float8" else ""
    return f"{floats}{plan.bits} bits in groups of {plan.group or 'a row'}"


def _are(level: LayerPlan, weights: Weights) -> bool:
    codes, bits, groups = weights
    return (level.codes, level.bits) == (codes, bits) and level.group in groups


def _weights(able: Weights) -> str:
    codes, bits, groups = able
    kind = "floats" if codes == "float8" else "codes"
    return f"{kind} of {bits} bits in groups of {_listed(groups)}{' (0: a row)' * (0 in groups)}"


def _formats(server: str) -> Mapping[str, Rules]:
    if server not in SERVERS:
        raise UserError(f"unknown server {server!r}.", f"Servers: {', '.join(SERVERS)}.")
    return SERVERS[server]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
