"""Low-rank corrections as a PEFT LoRA adapter, beside files that have no place for them.

A correction left @ right is lora_B @ lora_A with a scaling of 1, so that what peft or a server
adds to a layer is the correction itself.  The adapter lies in a folder of its own, for
transformers takes an `adapter_config.json` beside the weights for a model that is one.
https://github.com/huggingface/peft (0.21) is what the tests load it with.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from layerwise.core.keeping.staging import Arrangement, arrange
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.reading.checkpoint import TensorInfo
from layerwise.core.reading.structure import Layer
from layerwise.core.running.apply import Transformed

FOLDER = "adapter"
CONFIG = f"{FOLDER}/adapter_config.json"
_WEIGHTS = f"{FOLDER}/adapter_model.safetensors"
_PREFIX = "base_model.model."


def adapter_problem(layer: Layer, plan: LayerPlan) -> str:
    """Why an adapter has no place for a layer's correction; "" if it has, or there is none."""
    rules = (
        (layer.layout != "linear", f"a low-rank correction of a {layer.layout}"),
        # transformers joins the experts of a block; an adapter finds no module of that name.
        ("experts." in layer.name or layer.expert is not None, "a low-rank correction of experts"),
    )
    return next((problem for applies, problem in rules if applies and plan.rank), "")


def adapter_tensors(layer: Layer, plan: LayerPlan, info: TensorInfo) -> list[TensorInfo]:
    """The tensors of a layer's correction; none if it has none."""
    if not plan.rank:
        return []
    shapes = ((plan.rank, layer.width), (layer.rows, plan.rank))
    names = _names(layer)
    return [TensorInfo(name, info.dtype, shape) for name, shape in zip(names, shapes, strict=True)]


def encode_adapter(done: Transformed, dtype: torch.dtype) -> dict[str, Tensor]:
    """A layer's correction as those tensors."""
    if (sides := factors(done, dtype)) is None:
        return {}
    return dict(zip(_names(done.layer), (sides[1], sides[0]), strict=True))


def corrected(done: Transformed, base: Tensor, dtype: torch.dtype) -> Tensor:
    """A layer's matrix with the stored factors' product added."""
    sides = factors(done, dtype)
    return base if sides is None else base + sides[0].float() @ sides[1].float()


def factors(done: Transformed, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """A correction as stored: its right side takes the scales that went into the feeder."""
    if done.low_rank is None:
        return None
    scale = done.input_scale
    right = done.low_rank.right if scale is None else done.low_rank.right * scale
    return done.low_rank.left.to(dtype).contiguous(), right.to(dtype).contiguous()


def arrange_beside(tensors: Iterable[TensorInfo], stem: str) -> Arrangement:
    """The files of a model, and the one of its adapter if it has one."""
    own: list[TensorInfo] = []
    adapter: list[TensorInfo] = []
    for info in tensors:
        (adapter if info.name.startswith(_PREFIX) else own).append(info)
    return arrange(own, stem=stem, apart={_WEIGHTS: adapter} if adapter else {})


def adapter_files(plan: Plan) -> Mapping[str, bytes]:
    """The adapter's configuration, if there is an adapter."""
    ranks = {name: layer.rank for name, layer in plan.layers.items() if layer.rank}
    if not ranks:
        return {}
    largest = max(ranks.values())
    # peft reads a name here as a pattern.  Servers that know one rank take the largest.
    others = {re.escape(name): rank for name, rank in ranks.items() if rank != largest}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }
    return {CONFIG: (json.dumps(config, indent=2) + "\n").encode()}


def _names(layer: Layer) -> tuple[str, str]:
    return f"{_PREFIX}{layer.name}.lora_A.weight", f"{_PREFIX}{layer.name}.lora_B.weight"
