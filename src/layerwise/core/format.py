"""What a format must say: the tensors a layer becomes, and what a loader will make of them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.activation import Scheme
from layerwise.core.catalogue import Codes
from layerwise.core.errors import UserError
from layerwise.core.keeping.staging import Arrangement, arrange
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.reading.checkpoint import STEM, Source, TensorInfo
from layerwise.core.reading.structure import Layer, Structure
from layerwise.core.running.apply import Transformed
from layerwise.core.running.products import Answer


@runtime_checkable
class Trial(Protocol):
    """A model that was written, loaded back, to try other tensors in."""

    def put(self, tensor: str, value: Tensor) -> None:
        """Give it other values for a tensor, by its name in the original."""
        ...

    def loss(self) -> float:
        """Its mean cross-entropy on some of the calibration text, in nats per token."""
        ...


@dataclass(frozen=True)
class Format(ABC):
    """A way to store one model; what most formats have in common is said here.

    Attributes:
        source: The model: the original when files are written, those files when they are read.
        options: Options of methods, by id, which say how large some codes are.
        codes: What codes may stand for; others are stored in full.
        activations: How inputs may be rounded when the model runs.
        packages: What transformers needs to load it back, by import name.
        stem: How the names of its weight files begin.
        directory: Nothing reads it but what loads a model's whole directory.
        adapts: Low-rank corrections lie beside the files as an adapter, which peft loads.
        packs: Whether transformers keeps the files mapped and unpacks their layers when a model is
            first used.
        unpacking: Bytes that are held, for each weight of a layer, while it is unpacked.
        tries: Some of its small files say what becomes of the model with other tensors.
    """

    source: Source
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    codes: ClassVar[frozenset[Codes]] = frozenset({"integer"})
    activations: ClassVar[frozenset[Scheme]] = frozenset()
    packages: ClassVar[Sequence[str]] = ()
    stem: ClassVar[str] = STEM
    directory: ClassVar[bool] = False
    adapts: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    unpacking: ClassVar[float] = 0.0
    tries: ClassVar[bool] = False

    @abstractmethod
    def check(self, plan: Plan, found: Structure) -> None:
        """Refuse a plan that this format cannot hold.

        Raises:
            UserError: It names the layer and what the format allows.
        """

    @abstractmethod
    def tensors(self, layer: Layer, plan: LayerPlan, info: TensorInfo) -> list[TensorInfo]:
        """The tensors that take the place of a layer's weight."""

    @abstractmethod
    def encode(self, done: Transformed, info: TensorInfo) -> dict[str, Tensor]:
        """A layer as those tensors; rows of a layer, 32 or a multiple, as rows of its tensors."""

    @abstractmethod
    def restored(self, done: Transformed, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The matrix a loader will hold, in float32; `dtype` is the checkpoint's."""

    @classmethod
    def grid(cls, bits: int) -> tuple[int | None, bool | None]:
        """Group and symmetry that a width must have here; None where the user may choose."""
        return None, None

    def answer(self, done: Transformed, dtype: torch.dtype) -> Answer | None:
        """What a loader's layer answers where that is no product with `restored`."""
        return None

    def answers(self) -> Mapping[str, Answer]:
        """What layers of files of this format answer where `read` is not enough, by name."""
        return {}

    def size(self, layer: Layer, plan: LayerPlan, info: TensorInfo) -> int:
        """Bytes that a layer takes; in a format that packs nothing, what its codes would take."""
        if not plan.steps:
            return layer.count * (self.rest(info) or info).dtype.itemsize
        return sum(made.size for made in self.tensors(layer, plan, info))

    def constants(self, layer: Layer, plan: LayerPlan) -> dict[str, Tensor]:
        """Those of a layer's tensors that its weights have no part in."""
        return {}

    def whole(self, plan: LayerPlan) -> bool:
        """Whether a layer under this plan must be encoded in one piece."""
        return False

    def together(self, info: TensorInfo) -> int:
        """Rows of a tensor that must be encoded together: its slices hold a multiple of them."""
        return 1

    def rest(self, info: TensorInfo) -> TensorInfo | None:
        """How a tensor that is no layer, or that a plan leaves, is stored; None if it is not."""
        return info

    def encode_rest(self, info: TensorInfo, rows: Tensor) -> Tensor:
        """Rows of such a tensor (all of one without axes) as they are stored."""
        return rows

    def restored_rest(self, info: TensorInfo, rows: Tensor) -> Tensor:
        """What a loader will hold of those rows."""
        return rows

    def arrange(self, tensors: Iterable[TensorInfo]) -> Arrangement:
        """Files with room for all tensors."""
        return arrange(tensors, stem=self.stem)

    @property
    def reads(self) -> bool:
        """Whether `read` is what gives a loader the model's tensors."""
        return type(self).read is not Format.read

    def config(self, plan: Plan, found: Structure) -> Mapping[str, Any]:
        """What to add to the model's `config.json`."""
        return {}

    def files(self, plan: Plan, found: Structure) -> Mapping[str, bytes]:
        """Small files to put beside the weights, by their paths in the output."""
        return {}

    def finished(self, trial: Trial | None) -> Mapping[str, bytes]:
        """Small files about what was written, once all else is there; `source` is the output.

        Args:
            trial: The output, loaded back; None where it is not to be, or cannot be, run.
        """
        return {}

    def within(self, budget: int) -> "Format":
        """The same files, of which a loader reads no more than so many bytes.

        Raises:
            UserError: They have one size, or one that is larger.
        """
        raise UserError(
            f"{self.source.label} can be loaded in one size only.", "Leave the budget out."
        )

    @property
    def loader(self) -> str:
        """What loads files of this format, by the name of its package."""
        return "transformers"

    def load(self, dtype: torch.dtype) -> tuple[Any, Sequence[str]] | None:
        """The model by a loader that must be told how, and weights that were not in the files.

        None if transformers' `from_pretrained` needs to be told nothing.
        """
        return None

    def read(self) -> Mapping[str, Tensor] | None:
        """The model's own tensors from files of this format; None if transformers reads them."""
        return None
