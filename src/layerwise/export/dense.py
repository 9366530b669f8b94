"""Plain safetensors in the checkpoint's own names and dtypes: anything can load it."""

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import ALL_CODES
from layerwise.core.format import Format
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.reading.checkpoint import TensorInfo
from layerwise.core.reading.structure import Layer, Structure
from layerwise.core.running.apply import Transformed


class Dense(Format):
    """The weights a transform left, as ordinary tensors.  The files do not get smaller."""

    codes = ALL_CODES

    def check(self, plan: Plan, found: Structure) -> None:
        """Hold any plan."""

    def tensors(self, layer: Layer, plan: LayerPlan, info: TensorInfo) -> list[TensorInfo]:
        """The same tensor."""
        return [info]

    def size(self, layer: Layer, plan: LayerPlan, info: TensorInfo) -> int:
        """What the codes and grids of the plan would take: the tensor itself keeps its size."""
        if plan.bits is None:
            stored = layer.count * info.dtype.itemsize
        else:
            told = plan.told(self.options)
            stored = plan.quantizer.stores.taken(layer.rows, layer.width, told)
        return stored + plan.rank * (layer.rows + layer.width) * info.dtype.itemsize

    def encode(self, done: Transformed, info: TensorInfo) -> dict[str, Tensor]:
        """The matrix as its tensor lies, rounded to the checkpoint's dtype."""
        return {info.name: done.layer.store(_stored(done).to(info.dtype), (-1, *info.shape[1:]))}

    def restored(self, done: Transformed, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """What is left after rounding."""
        return _stored(done).to(dtype).float()


def _stored(done: Transformed) -> Float[Tensor, "out in"]:
    """The weight that multiplies the input after its scales went into the feeder."""
    return done.weight if done.input_scale is None else done.weight * done.input_scale
