"""What was made before, kept on disk under a digest of what it was made from.

An entry is one safetensors file with a checksum of what it holds.  One that is damaged is removed
and counts as absent; when all of them together outgrow the limit, those that were not used for
longest go first.
"""

import contextlib
import json
import os
import tempfile
import zlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from layerwise.core.packing import raw_bytes

ENVIRONMENT = "LAYERWISE_CACHE"
_SUFFIX = ".safetensors"
_FACTS, _CHECKSUM = "facts", "checksum"


@dataclass(frozen=True, slots=True)
class Entry:
    """What is kept under one key: tensors, and what JSON can hold."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


@dataclass
class Cache:
    """Entries in one folder, or none at all.

    Attributes:
        folder: Where they are; None keeps nothing.
        limit: Most bytes of all entries together.
        damaged: Entries that were found damaged and removed.
        problem: Why something could not be kept; "" if everything was.
    """

    folder: Path | None
    limit: int = 0
    damaged: int = 0
    problem: str = ""
    _used: int = field(default=-1, repr=False)

    @property
    def notes(self) -> list[str]:
        """What a report should say of it."""
        notes = [f"the cache could not be written: {self.problem}"] if self.problem else []
        if self.damaged:
            notes.append(f"{self.damaged} damaged entries of the cache were made again")
        return notes

    def get(self, key: str) -> Entry | None:
        """What is kept under a key; None if nothing is, or it is damaged."""
        file = self._file(key)
        if file is None or not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                told = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            whole = told.get(_CHECKSUM) == _checksum(tensors, told.get(_FACTS, ""))
            entry = Entry(tensors, json.loads(told[_FACTS])) if whole else None
        except (OSError, SafetensorError, KeyError, ValueError):
            entry = None
        if entry is None:
            self.damaged += 1
            self._used = -1
        with contextlib.suppress(OSError):
            os.utime(file) if entry else file.unlink()
        return entry

    def has(self, key: str) -> bool:
        """Whether something is kept under a key, whole or not."""
        file = self._file(key)
        return file is not None and file.exists()

    def put(self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep something; where that is not possible, `problem` says why and work goes on."""
        file = self._file(key)
        if file is None:
            return
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        text = json.dumps(facts, sort_keys=True)
        told = {_FACTS: text, _CHECKSUM: _checksum(contiguous, text)}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, made = tempfile.mkstemp(dir=file.parent, suffix=".new")
            os.close(descriptor)
            try:
                save_file(contiguous, made, told)
                size, before = os.path.getsize(made), file.stat().st_size if file.exists() else 0
                os.replace(made, file)
            except BaseException:
                os.unlink(made)
                raise
        except (OSError, SafetensorError) as error:
            self.problem = f"{self.folder}: {error}"
            return
        self._shrink(size - before)

    def _file(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / key[:2] / f"{key}{_SUFFIX}"

    def _shrink(self, added: int) -> None:
        """Remove what was not used for longest, until the rest fits well within the limit."""
        assert self.folder is not None
        self._used = self._used + added if self._used >= 0 else _total(self.folder)
        if self._used <= self.limit:
            return
        found = [(file.stat(), file) for file in self.folder.glob(f"*/*{_SUFFIX}")]
        self._used = sum(stat.st_size for stat, _ in found)
        for stat, file in sorted(found, key=lambda one: one[0].st_mtime_ns):
            if self._used <= 0.9 * self.limit:
                break
            file.unlink(missing_ok=True)
            self._used -= stat.st_size


@contextlib.contextmanager
def opened(limit: int, *, lasting: bool = True) -> Generator[Cache]:
    """A cache for one run: the user's, or one that is removed when the run ends.

    Args:
        limit: Most bytes of all entries together.
        lasting: Keep the entries for other runs.
    """
    if lasting:
        yield Cache(default_folder() / "candidates", limit)
        return
    with tempfile.TemporaryDirectory(prefix="layerwise-") as folder:
        yield Cache(Path(folder), limit)


def default_folder() -> Path:
    """`$LAYERWISE_CACHE`, or `layerwise` where the system keeps caches."""
    if named := os.environ.get(ENVIRONMENT):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "layerwise"


def _total(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob(f"*/*{_SUFFIX}"))


def _checksum(tensors: Mapping[str, Tensor], facts: str) -> str:
    value = zlib.crc32(facts.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(raw_bytes(tensor), value)
    return f"{value:08x}"
