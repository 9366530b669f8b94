"""Plain safetensors in the checkpoint's own names and dtypes: anything can load it."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.apply import Transformed
from layerwise.core.checkpoint import STEM, Checkpoint, TensorInfo
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.structure import Layer, Structure


class Dense:
    """The weights a transform left, as ordinary tensors.  The files do not get smaller."""

    packages = ()
    stem = STEM

    def check(self, plan: Plan, found: Structure) -> None:
        """Hold any plan."""

    def tensors(self, layer: Layer, plan: LayerPlan, info: TensorInfo) -> list[TensorInfo]:
        """The same tensor."""
        return [info]

    def size(self, layer: Layer, plan: LayerPlan, info: TensorInfo) -> int:
        """What the codes and grids of the plan would take: the tensor itself keeps its size."""
        return -int(-layer.count * plan.stored_bits(layer, info.dtype.itemsize * 8) // 8)

    def encode(self, done: Transformed, info: TensorInfo) -> dict[str, Tensor]:
        """The matrix as its tensor lies, rounded to the checkpoint's dtype."""
        return {info.name: done.layer.store(_stored(done).to(info.dtype), (-1, *info.shape[1:]))}

    def constants(self, layer: Layer, plan: LayerPlan) -> dict[str, Tensor]:
        """None."""
        return {}

    def restored(self, done: Transformed, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """What is left after rounding."""
        return _stored(done).to(dtype).float()

    def whole(self, plan: LayerPlan) -> bool:
        """Never: any rows can be encoded by themselves."""
        return False

    def read(self, source: Checkpoint) -> None:
        """Nothing: transformers reads it."""

    def config(
        self, plan: Plan, found: Structure, tensors: Mapping[str, TensorInfo]
    ) -> Mapping[str, Any]:
        """Nothing to add."""
        return {}


def _stored(done: Transformed) -> Float[Tensor, "out in"]:
    """The weight that multiplies the input after its scales went into the feeder."""
    return done.weight if done.input_scale is None else done.weight * done.input_scale
