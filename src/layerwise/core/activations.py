"""What is carried from block to block: windows of activations, in memory or in a file."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from layerwise.core.checkpoint import TensorInfo


@runtime_checkable
class Activations(Protocol):
    """Windows along the first axis: a tensor, or a file that is read window by window."""

    def __len__(self) -> int:
        """Number of windows."""
        ...

    def __getitem__(self, windows: slice, /) -> Tensor:
        """Some windows."""
        ...

    @property
    def shape(self) -> torch.Size:
        """All axes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What they are computed in."""
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """Activations in a file, read when they are looked at.

    Attributes:
        path: The file.
        offset: Where they begin in it.
        info: What they are.
    """

    path: Path
    offset: int
    info: TensorInfo

    def __len__(self) -> int:
        """Number of windows."""
        return self.info.shape[0]

    def __getitem__(self, windows: slice, /) -> Tensor:
        """Some windows, as a copy of their own."""
        start, stop, _ = windows.indices(len(self))
        each = self.info.size // len(self)
        data = bytearray(max(0, stop - start) * each)
        with self.path.open("rb") as file:
            file.seek(self.offset + start * each)
            file.readinto(data)
        return torch.frombuffer(data, dtype=self.info.dtype).view(-1, *self.info.shape[1:])

    @property
    def shape(self) -> torch.Size:
        """All axes."""
        return torch.Size(self.info.shape)

    @property
    def dtype(self) -> torch.dtype:
        """What they were computed in."""
        return self.info.dtype


def batches(carried: Activations, windows: int) -> Iterator[Tensor]:
    """All windows in order, so many at a time."""
    for start in range(0, len(carried), windows):
        yield carried[start : start + windows]


def filled(parts: Iterable[Tensor], windows: int, into: Tensor | None = None) -> Tensor:
    """One tensor of parts that come one after the other, without holding them twice.

    Args:
        parts: Windows, in order.
        windows: How many will come.
        into: A tensor that may be overwritten as they come, if they are of its kind: part after
            part, each no earlier than the windows that it takes the place of were read.
    """
    made: Tensor | None = None
    at = 0
    for part in parts:
        if made is None:
            shape = (windows, *part.shape[1:])
            fits = into is not None and into.shape == shape and into.dtype == part.dtype
            made = into if into is not None and fits else torch.empty(shape, dtype=part.dtype)
        made[at : at + len(part)] = part
        at += len(part)
    assert made is not None, "there are no windows"
    assert at == windows, f"{at} windows came, {windows} were to come"
    return made


def write_at(handle: int, data: memoryview, offset: int) -> None:
    """Write all of some bytes to an open file."""
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written
