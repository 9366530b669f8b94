"""A model put together from tensors of others: renamed, or with rows in another order."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from layerwise.core.reading.checkpoint import Source, TensorInfo


@dataclass(frozen=True)
class Piece:
    """Where a tensor comes from.

    Attributes:
        source: The model that has it.
        name: What it is called there.
        rows: Which of its rows are taken, in order, -1 where it has none; None takes all.
        instead: What gives the rows that it lacks, in the order wanted.
    """

    source: Source
    name: str
    rows: Int64[Tensor, " rows"] | None = None
    instead: "Piece | None" = None

    @property
    def info(self) -> TensorInfo:
        """The tensor as it is where it comes from."""
        return self.source.tensors[self.name]

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor, or rows `start` to `stop` of what is made of it."""
        if self.rows is None:
            return self.source.read(self.name, start, stop)
        wanted = self.rows[start:stop]
        has = wanted >= 0
        # Rows are read in one run from the first to the last that is wanted.
        low, high = (int(wanted[has].min()), int(wanted[has].max()) + 1) if has.any() else (0, 0)
        made = torch.zeros(len(wanted), *self.info.shape[1:], dtype=self.info.dtype)
        if high > low:
            made[has] = self.source.read(self.name, low, high)[wanted[has] - low]
        if self.instead is not None and not bool(has.all()):
            made[~has] = self.instead.read(start, stop)[~has].to(made.dtype)
        return made


@dataclass(frozen=True)
class Assembled:
    """A source whose tensors are pieces of others."""

    label: str
    pieces: Mapping[str, Piece]
    config: Mapping[str, Any]
    companions: tuple[Path, ...]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, under its new name and shape."""
        return self._infos

    @functools.cached_property
    def _infos(self) -> Mapping[str, TensorInfo]:
        made: dict[str, TensorInfo] = {}
        for name, piece in self.pieces.items():
            shape = piece.info.shape
            if piece.rows is not None:
                shape = (len(piece.rows), *shape[1:])
            made[name] = TensorInfo(name, piece.info.dtype, shape)
        return MappingProxyType(made)

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(info.size for info in self.tensors.values())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or rows `start` to `stop` of it, as a copy of its own."""
        return self.pieces[name].read(start, stop)

    def plain(self, name: str) -> Piece | None:
        """Where a tensor comes from if it is taken as it is."""
        piece = self.pieces[name]
        return piece if piece.rows is None else None
