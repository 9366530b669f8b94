"""What is carried from block to block: windows of activations, in memory or in a file."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from layerwise.core.packing import raw_bytes
from layerwise.core.reading.checkpoint import TensorInfo


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


def stored(
    path: Path,
    parts: Iterable[Tensor],
    windows: int,
    header: Callable[[TensorInfo], bytes] = lambda _: b"",
) -> Stored:
    """Write activations to a file as they come.

    Args:
        path: The file.
        parts: Windows, in order; none of them is read from this file.
        windows: How many will come.
        header: What the file begins with.
    """
    made: Stored | None = None
    at = 0
    with path.open("wb") as handle:
        for part in parts:
            if made is None:
                info = TensorInfo(path.name, part.dtype, (windows, *part.shape[1:]))
                begun = header(info)
                handle.write(begun)
                handle.flush()
                made = Stored(path, len(begun), info)
            each = made.info.size // windows
            write_at(handle.fileno(), raw_bytes(part), made.offset + at * each)
            at += len(part)
    assert made is not None, "there are no windows"
    return made


@dataclass(frozen=True, slots=True)
class Shelf:
    """Where activations lie that nobody needs after this process: in memory, or in a folder."""

    folder: Path | None = None

    def keep(
        self, name: str, parts: Iterable[Tensor], windows: int, into: Activations | None = None
    ) -> Activations:
        """Activations as they come; those that had the name may be read meanwhile, and are gone.

        Args:
            name: What they are.
            parts: Windows, in order.
            windows: How many will come.
            into: What may be overwritten as they come: see `filled`.
        """
        if self.folder is None:
            return filled(parts, windows, into if isinstance(into, Tensor) else None)
        path = self.folder / name
        made = stored(path.with_name(f"{name}.new"), parts, windows)
        made.path.replace(path)
        return Stored(path, made.offset, made.info)


@contextlib.contextmanager
def shelf(on_disk: bool, folder: Path | None) -> Generator[Shelf]:
    """A shelf for some work, in a folder of its own where it is on disk.

    Args:
        on_disk: Whether it is.
        folder: Where its folder is made; None for where the system has temporary files.
    """
    if not on_disk:
        yield Shelf()
        return
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="activations-", dir=folder) as made:
        yield Shelf(Path(made))


def write_at(handle: int, data: memoryview, offset: int) -> None:
    """Write all of some bytes to an open file."""
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written
