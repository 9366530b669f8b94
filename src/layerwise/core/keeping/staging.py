"""Output that appears whole or not at all, and a run that can be killed anywhere.

All sizes are known before work starts, so every shard is laid out and its disk space reserved
first; tensors are then written in place, in any order, a slice at a time.  All of it happens in
`OUT.partial`, which becomes `OUT` by one rename.  A journal beside the shards records each
finished step with checksums, and whatever the next step needs.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Generator, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.packing import raw_bytes
from layerwise.core.reading.checkpoint import DTYPES, INDEX_SUFFIX, STEM, TensorInfo
from layerwise.core.running.carried import Activations, Stored, stored, write_at

_JOURNAL = "journal.jsonl"
_LOCK = "lock"
_STATE, _ASIDE = "state-", "aside-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 4_000_000_000


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor lies: its file, its first byte there, and what it holds."""

    file: str
    offset: int
    info: TensorInfo


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Every output tensor's place, and every file's header and length.

    Attributes:
        stem: How the names of the model's own weight files begin.
        slots: Where each tensor lies.
        headers: What each file begins with, by its path inside the output.
        lengths: Bytes of each file.
        apart: Files whose tensors are not the model's own, and so in no index.
    """

    stem: str
    slots: Mapping[str, Slot]
    headers: Mapping[str, bytes]
    lengths: Mapping[str, int]
    apart: Set[str] = frozenset()

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(self.lengths.values())

    def index(self) -> dict[str, bytes]:
        """The file that says which shard holds a tensor, by its name; none for a single shard."""
        if len(self.headers.keys() - self.apart) == 1:
            return {}
        own = {name: slot for name, slot in self.slots.items() if slot.file not in self.apart}
        total = sum(slot.info.size for slot in own.values())
        files = {name: slot.file for name, slot in sorted(own.items())}
        content = _json({"metadata": {"total_size": total}, "weight_map": files})
        return {f"{self.stem}{INDEX_SUFFIX}": content}


def arrange(
    tensors: Iterable[TensorInfo],
    shard_bytes: int = SHARD_BYTES,
    stem: str = STEM,
    apart: Mapping[str, Sequence[TensorInfo]] = MappingProxyType({}),
) -> Arrangement:
    """Lay tensors out in safetensors files of at most `shard_bytes`, or one tensor if larger.

    Args:
        tensors: The model's own tensors.
        shard_bytes: Where a new file begins.
        stem: How the files' names begin.
        apart: Tensors that are not the model's own, by the path of the one file they lie in.
    """
    shards: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in tensors:
        if shards[-1] and filled + info.size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(info)
        filled += info.size
    named: dict[str, Sequence[TensorInfo]] = {}
    for number, shard in enumerate(shards, 1):
        part = "" if len(shards) == 1 else f"-{number:05}-of-{len(shards):05}"
        named[f"{stem}{part}.safetensors"] = shard
    slots: dict[str, Slot] = {}
    headers: dict[str, bytes] = {}
    lengths: dict[str, int] = {}
    for file, shard in {**named, **apart}.items():
        # Widest entries first keeps every tensor aligned to its own width.
        ordered = sorted(shard, key=lambda info: -info.dtype.itemsize)
        header, starts, end = _header(ordered)
        headers[file], lengths[file] = header, end
        slots |= {info.name: Slot(file, starts[info.name], info) for info in ordered}
    return Arrangement(stem, slots, headers, lengths, frozenset(apart))


def _header(tensors: Sequence[TensorInfo]) -> tuple[bytes, dict[str, int], int]:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in tensors:
        span = [end, end + info.size]
        entries[info.name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": span,
        }
        end = span[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    starts = {info.name: len(header) + entries[info.name]["data_offsets"][0] for info in tensors}
    return header, starts, len(header) + end


@dataclass
class Staging:
    """One output directory in the making, for a `with` block.  Made by `stage`.

    `most_bytes` is the most room that its files took so far.
    """

    out: Path
    folder: Path
    arrangement: Arrangement
    lock: IO[bytes]
    steps: dict[str, dict[str, Any]]
    handles: dict[str, IO[bytes]]
    checksums: dict[str, int] = field(default_factory=dict[str, int])
    added: set[str] = field(default_factory=set[str])
    most_bytes: int = 0

    def __enter__(self) -> "Staging":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # What the user must change first makes another run; anything else can be taken up again.
        if isinstance(error, UserError):
            shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def write(self, name: str, tensor: Tensor, row: int = 0, expert: int | None = None) -> None:
        """Write rows of a tensor, `row` the first of them; slices of a tensor come in order.

        Args:
            name: The tensor.
            tensor: Its rows, or rows of one of its entries.
            row: Where they begin.
            expert: Which entry along the first axis they are rows of; None for the tensor's own.
        """
        slot = self.arrangement.slots[name]
        shape = slot.info.shape if expert is None else slot.info.shape[1:]
        assert tensor.dtype == slot.info.dtype, f"{name}: {tensor.dtype} for {slot.info.dtype}"
        assert tensor.shape[1:] == torch.Size(shape[1:]), f"{name}: {tensor.shape}"
        self.write_entries(
            name, tensor, (expert or 0) * math.prod(shape) + row * math.prod(shape[1:])
        )

    def write_entries(self, name: str, entries: Tensor, start: int) -> None:
        """Write a run of a tensor's entries as they lie in memory; runs of a tensor come in order.

        Args:
            name: The tensor.
            entries: The entries, in its dtype.
            start: Which entry the first of them is.
        """
        slot, data = self.arrangement.slots[name], raw_bytes(entries)
        assert entries.dtype == slot.info.dtype, f"{name}: {entries.dtype}"
        handle, offset = self.handles[slot.file], slot.offset + start * slot.info.dtype.itemsize
        with _room(self.out, self.arrangement.size):
            write_at(handle.fileno(), data, offset)
        self.checksums[name] = zlib.crc32(data, self.checksums.get(name, 0))

    def finish_step(
        self, step: str, facts: Mapping[str, Any], states: Mapping[str, Activations] | None = None
    ) -> None:
        """Record that a step's tensors are on disk, with `facts` for whoever resumes.

        Args:
            step: The step's name; a resumed run finds it in `steps` and leaves it out.
            facts: What JSON can hold.
            states: What the next step needs; those of the step before are dropped.
        """
        entry: dict[str, Any] = {"step": step, "checksums": self.checksums, "facts": dict(facts)}
        with _room(self.out, self.arrangement.size):
            self._flush()
            if states is not None:
                entry["states"] = {
                    name: self._stored(step, name, state) for name, state in states.items()
                }
            _append(self.folder / _JOURNAL, entry)
        self._weigh()
        if states is not None:
            for old in self.steps.values():
                old.pop("states", None)
            for file in sorted(self.folder.glob(f"{_STATE}*")):
                if file.name not in entry["states"].values():
                    file.unlink()
        self.steps[step] = entry
        self.checksums = {}

    def store(
        self, step: str, name: str, parts: Iterable[Tensor], windows: int, *, aside: bool = False
    ) -> Stored:
        """Write activations to disk as they come, for a step that may finish with them.

        Args:
            step: The step that makes them.
            name: What they are.
            parts: Windows, in order; what the step reads meanwhile is of another step.
            windows: How many will come.
            aside: No step finishes with them: whoever makes them drops them.
        """
        path = self.folder / f"{_ASIDE if aside else _STATE}{step}-{name}.tensors"
        with _room(self.out, self.arrangement.size):
            made = stored(path, parts, windows, lambda info: _header([replace(info, name=name)])[0])
        self._weigh()
        return made

    def _stored(self, step: str, name: str, state: Activations) -> str:
        """The file that holds a state, which is on disk by now."""
        if isinstance(state, Tensor):
            state = self.store(step, name, [state], len(state))
        assert isinstance(state, Stored)
        _sync(state.path)
        return state.path.name

    def states(self) -> dict[str, Stored] | None:
        """What the last finished step left for the next one."""
        left = [entry["states"] for entry in self.steps.values() if "states" in entry]
        if not left:
            return None
        return {name: _opened(self.folder / file, name) for name, file in left[-1].items()}

    def add(self, files: Mapping[str, bytes | Path]) -> None:
        """Put the small files beside the shards, the shards' index with them."""
        with _room(self.out, self.arrangement.size):
            self._flush()
            for name, content in {**files, **self.arrangement.index()}.items():
                target = self.folder / name
                target.parent.mkdir(exist_ok=True)
                if isinstance(content, bytes):
                    target.write_bytes(content)
                else:
                    shutil.copyfile(content, target)
                _sync(target)
                self.added.add(name)
        self._weigh()

    def publish(self) -> None:
        """Let the output appear under its name, whole."""
        self._flush()
        _clear(self.folder, self.added | self.arrangement.headers.keys())
        self.folder.rename(self.out)
        _sync(self.out.parent)
        self.close()

    def close(self) -> None:
        """Let go of the files and the lock; what is staged stays for a run that takes it up."""
        for handle in self.handles.values():
            handle.close()
        self.lock.close()

    def _weigh(self) -> None:
        """Note how much room the folder takes."""
        held = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        self.most_bytes = max(self.most_bytes, held)

    def _flush(self) -> None:
        for handle in self.handles.values():
            os.fsync(handle.fileno())


def check_target(out: Path) -> None:
    """Refuse an output that exists.

    Raises:
        UserError: Something is there already.
    """
    if out.exists():
        raise UserError(
            f"{out} exists already, and nothing is ever overwritten.",
            "Choose another -o, or remove it yourself.",
        )


def partial_folder(out: Path) -> Path:
    """Where an output is while it is being made."""
    return out.with_name(out.name + ".partial")


def stage(out: Path, arrangement: Arrangement, identity: str, *, restart: bool) -> Staging:
    """Reserve the disk space for an output, or take up a run that stopped.

    Args:
        out: Directory to make; must not exist.
        arrangement: Its tensors.
        identity: Says what run this is; a stopped run is only taken up by the same one.
        restart: Throw a stopped run away instead.

    Raises:
        UserError: The output exists or cannot be made, its disk is too full, another run is at
            work on it, or a different one stopped there.
    """
    check_target(out)
    folder = partial_folder(out)
    lock = _lock(folder, out, arrangement)
    handles: dict[str, IO[bytes]] = {}
    try:
        if restart:
            _clear(folder, {_LOCK})
        steps = _resume(folder, out, identity)
        if steps is None or not _laid_out(folder, arrangement):
            _clear(folder, {_LOCK})
            _reserve(folder, out, arrangement)
            _append(folder / _JOURNAL, {"identity": identity})
            steps = {}
        for file in arrangement.headers:
            handles[file] = (folder / file).open("r+b")
        staging = Staging(out, folder, arrangement, lock, steps, handles)
        _drop_damaged(staging)
        _rewrite(folder / _JOURNAL, [{"identity": identity}, *staging.steps.values()])
    except BaseException:
        for held in (*handles.values(), lock):
            held.close()
        raise
    return staging


def _lock(folder: Path, out: Path, arrangement: Arrangement) -> IO[bytes]:
    """Make the folder, or take a stopped run's, for as long as the lock is held."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = {file.name for file in folder.iterdir()}
    except OSError as error:
        raise UserError(
            f"{folder} cannot be made: {error.strerror}.", "Choose another -o."
        ) from error
    if there and not there & {_LOCK, *arrangement.headers}:
        raise UserError(
            f"{folder}, where {out} would be made, holds files that no run put there.",
            "Choose another -o, or move them away.",
        )
    lock = (folder / _LOCK).open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(
            f"another run is writing {out} at this moment.", "Wait for it, or choose another -o."
        ) from None
    return lock


def _clear(folder: Path, kept: Set[str]) -> None:
    """Remove the files of a run; the journal and the lock, which tell it is one, go last."""
    places = list(folder.rglob("*"))
    files = [place for place in places if not place.is_dir()]
    for file in sorted(files, key=lambda file: (file.name == _LOCK, file.name == _JOURNAL)):
        if file.relative_to(folder).as_posix() not in kept:
            file.unlink()
    for place in places:
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def _reserve(folder: Path, out: Path, arrangement: Arrangement) -> None:
    try:
        with _room(out, arrangement.size):
            for file, header in arrangement.headers.items():
                (folder / file).parent.mkdir(exist_ok=True)
                with (folder / file).open("wb") as handle:
                    if sys.platform == "linux":
                        os.posix_fallocate(handle.fileno(), 0, arrangement.lengths[file])
                    else:  # elsewhere the length is set, and a full disk is met on the way
                        os.truncate(handle.fileno(), arrangement.lengths[file])
                    handle.write(header)
    except BaseException:
        shutil.rmtree(folder)
        raise


def _laid_out(folder: Path, arrangement: Arrangement) -> bool:
    """Whether every shard is there, as long as it must be, under its header."""
    for file, header in arrangement.headers.items():
        path = folder / file
        if not path.exists() or path.stat().st_size != arrangement.lengths[file]:
            return False
        with path.open("rb") as handle:
            if handle.read(len(header)) != header:
                return False
    return True


def _resume(folder: Path, out: Path, identity: str) -> dict[str, dict[str, Any]] | None:
    """The finished steps of a stopped run; None if it had not begun."""
    journal = folder / _JOURNAL
    # A line that a kill cut short has no newline after it.
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []
    if not lines:
        return None
    entries = [json.loads(line) for line in lines]
    if entries[0].get("identity") != identity:
        raise UserError(
            f"{folder} holds a run that stopped, with other weights or other options than these.",
            f"Repeat that run's command to finish it, or add --restart to throw it away for {out}.",
        )
    return {entry["step"]: entry for entry in entries[1:]}


def _drop_damaged(staging: Staging) -> None:
    """Forget the first step whose bytes are not what the journal says, and all after it."""
    needs_state = any("states" in entry for entry in staging.steps.values())
    sound = True
    for step, entry in list(staging.steps.items()):
        files = entry.get("states", {}).values()
        sound = sound and all(
            _checksum(staging, name) == value for name, value in entry["checksums"].items()
        )
        if not sound:
            del staging.steps[step]
        elif files and not all(_readable(staging.folder / file) for file in files):
            # A later step replaced them, or they are damaged.
            del entry["states"]
    carried = any("states" in entry for entry in staging.steps.values())
    if needs_state and not carried:
        staging.steps.clear()


def _checksum(staging: Staging, name: str) -> int:
    slot = staging.arrangement.slots[name]
    handle, left, offset, value = staging.handles[slot.file], slot.info.size, slot.offset, 0
    while left:
        data = os.pread(handle.fileno(), min(left, 1 << 22), offset)
        assert data, f"{slot.file} has become shorter"
        value, left, offset = zlib.crc32(data, value), left - len(data), offset + len(data)
    return value


def _readable(state: Path) -> bool:
    try:
        with safe_open(state, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _opened(path: Path, name: str) -> Stored:
    """Activations that `Staging.store` wrote."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[name]
    info = TensorInfo(name, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return Stored(path, 8 + size + entry["data_offsets"][0], info)


def _rewrite(journal: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Leave out what is not to be believed any more, in one go."""
    fresh = journal.with_name(_JOURNAL + ".new")
    fresh.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    _sync(fresh)
    fresh.replace(journal)


def _append(journal: Path, entry: Mapping[str, Any]) -> None:
    with journal.open("ab") as handle:
        handle.write(json.dumps(entry).encode() + b"\n")
        handle.flush()
        os.fsync(handle.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


@contextlib.contextmanager
def _room(out: Path, size: int) -> Generator[None]:
    """Say of a full disk that it is one."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors reports what the system said in words only.
        if isinstance(error, OSError) and error.errno not in _FULL:
            raise
        raise UserError(
            f"{out} needs {size / 1e9:.3f} GB, and room to work in, which its disk does not have: "
            f"{getattr(error, 'strerror', None) or error}.",
            "Make room, or put -o on another disk.",
        ) from error
