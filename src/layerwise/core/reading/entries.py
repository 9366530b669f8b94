"""Runs of entries of tensors, read without mapping their files."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.reading.assembled import Assembled
from layerwise.core.reading.checkpoint import Checkpoint, Source


@dataclass
class Reader:
    """Reads any run of entries of a source's tensors, for a `with` block.

    A file stays open, and its bytes are copied: pages of a mapping would count as this process's
    memory, and opening a file for each slice would take longer than reading it.
    """

    source: Source
    _files: dict[Path, int] = field(default_factory=dict[Path, int])
    _offsets: dict[Path, Mapping[str, int]] = field(default_factory=dict[Path, Mapping[str, int]])
    _inner: dict[int, "Reader"] = field(default_factory=dict[int, "Reader"])

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            os.close(file)
        for inner in self._inner.values():
            inner.__exit__(kind, error, trace)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Shaped[Tensor, " _"]:
        """Entries `start` to `stop` of a tensor as it lies in memory, in its own dtype.

        Raises:
            UserError: The file has become shorter.
        """
        source, info = self.source, self.source.tensors[name]
        stop = info.count if stop is None else min(stop, info.count)
        if isinstance(source, Assembled) and (piece := source.plain(name)) is not None:
            inner = self._inner.setdefault(id(piece.source), Reader(piece.source))
            return inner.read(piece.name, start, stop)
        if not isinstance(source, Checkpoint):
            width = max(1, info.count // info.shape[0]) if info.shape else 1
            first = start // width
            rows = source.read(name, first, -(-stop // width))
            return rows.reshape(-1)[start - first * width : stop - first * width]
        file = source.files[name]
        found = torch.empty((stop - start) * info.dtype.itemsize, dtype=torch.uint8)
        place = self._start(file, name) + start * info.dtype.itemsize
        into, done = found.numpy().data, 0
        while done < len(into):
            got = os.preadv(self._files[file], [into[done:]], place + done)
            if not got:
                raise UserError(f"{file} has become shorter.", "Copy that file again.")
            done += got
        return found.view(info.dtype)

    def whole(self, name: str) -> Tensor:
        """All of a tensor, in its shape."""
        return self.read(name).reshape(self.source.tensors[name].shape)

    def _start(self, file: Path, name: str) -> int:
        """Where a tensor begins in its file."""
        if file not in self._files:
            self._files[file] = os.open(file, os.O_RDONLY)
            size = int.from_bytes(os.pread(self._files[file], 8, 0), "little")
            header: Any = json.loads(os.pread(self._files[file], size, 8))
            header.pop("__metadata__", None)
            self._offsets[file] = {
                tensor: 8 + size + entry["data_offsets"][0] for tensor, entry in header.items()
            }
        return self._offsets[file][name]
