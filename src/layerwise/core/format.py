"""What a format must say: the tensors a layer becomes, and what a loader will make of them."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.apply import Transformed
from layerwise.core.checkpoint import Checkpoint, TensorInfo
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.structure import Layer, Structure


def packed_size(format: "Format", layer: Layer, plan: LayerPlan, info: TensorInfo) -> int:
    """The size of a layer in a format that packs: its tensors'."""
    if not plan.steps:
        return layer.count * info.dtype.itemsize
    return sum(made.size for made in format.tensors(layer, plan, info))


class Format(Protocol):
    """A way to store transformed layers."""

    @property
    def packages(self) -> Sequence[str]:
        """What transformers needs to load it back, by import name."""
        ...

    @property
    def stem(self) -> str:
        """How the names of its weight files begin."""
        ...

    def check(self, plan: Plan, found: Structure) -> None:
        """Refuse a plan that this format cannot hold.

        Raises:
            UserError: It names the layer and what the format allows.
        """
        ...

    def tensors(self, layer: Layer, plan: LayerPlan, info: TensorInfo) -> list[TensorInfo]:
        """The tensors that take the place of a layer's weight."""
        ...

    def size(self, layer: Layer, plan: LayerPlan, info: TensorInfo) -> int:
        """Bytes that a layer takes; in a format that packs nothing, what its codes would take."""
        ...

    def encode(self, done: Transformed, info: TensorInfo) -> dict[str, Tensor]:
        """A layer as those tensors; rows of a layer, 32 or a multiple, as rows of its tensors."""
        ...

    def constants(self, layer: Layer, plan: LayerPlan) -> dict[str, Tensor]:
        """Those of a layer's tensors that its weights have no part in."""
        ...

    def restored(self, done: Transformed, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The matrix a loader will hold, in float32; `dtype` is the checkpoint's."""
        ...

    def whole(self, plan: LayerPlan) -> bool:
        """Whether a layer under this plan must be encoded in one piece."""
        ...

    def config(
        self, plan: Plan, found: Structure, tensors: Mapping[str, TensorInfo]
    ) -> Mapping[str, Any]:
        """What to add to the model's `config.json`; `tensors` are the checkpoint's."""
        ...

    def read(self, source: Checkpoint) -> Mapping[str, Tensor] | None:
        """The model's own tensors from files of this format; None if transformers reads them."""
        ...
