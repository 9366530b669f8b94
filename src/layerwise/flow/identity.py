"""What a run is made from, as one digest: the same digest, the same bytes."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from layerwise import __version__
from layerwise.core.keeping.cache import Cache
from layerwise.core.keeping.candidates import Candidates
from layerwise.core.merging.blend import Blend
from layerwise.core.packing import raw_bytes
from layerwise.core.plan import Plan
from layerwise.core.reading.checkpoint import Checkpoint, ModuleSource
from layerwise.core.reading.parents import Parents
from layerwise.core.rewriting.rewriting import original, told_of
from layerwise.flow.preparing import Prepared

_CHUNK = 1 << 24


def run_identity(prepared: Prepared, plan: Plan) -> str:
    """Says what a compression is; a stopped one is only taken up by the same."""
    work = {name: asdict(layer.work) for name, layer in plan.layers.items()}
    options = {id: dict(chosen) for id, chosen in plan.options.items()}
    return _digest(
        prepared, [plan.format, plan.inputs, work, options, list(plan.tune), plan.recover]
    )


def merge_identity(found: Parents, blend: Blend, asked: Any) -> str:
    """Says what a merge is; the order in which its models were given is no part of it."""
    everyone = [*found.models, *([found.base] if found.base else [])]
    settings = {
        name: [found.ordered(list(one.shares)) if one.shares else [], dict(one.options)]
        for name, one in blend.settings.items()
    }
    said = [__version__, blend.method, settings, asked, found.base is None]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode())
    for one in everyone:
        digest.update(json.dumps(dict(one.config), sort_keys=True, default=str).encode())
        for info in one.tensors.values():
            digest.update(f"{info.name} {info.dtype} {info.shape}".encode())
        for file in sorted(set(one.files.values())) if isinstance(one, Checkpoint) else ():
            digest.update(_stamp(file).encode())
    digest.update(" ".join(found.digests).encode())
    return digest.hexdigest()


def sweep_identity(prepared: Prepared, points: Sequence[Mapping[str, Any]]) -> str:
    """Says what a sweep is."""
    return _digest(prepared, points)


def _digest(prepared: Prepared, asked: Any) -> str:
    """Digest of what is asked for, and of the model, texts and device it is asked of."""
    source = original(prepared.source)
    said = [__version__, asked, dict(source.config), _device(prepared), prepared.noise_floor]
    said.append(told_of(prepared.source))
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode())
    for info in source.tensors.values():
        digest.update(f"{info.name} {info.dtype} {info.shape}".encode())
        if isinstance(source, ModuleSource):
            digest.update(raw_bytes(source.read(info.name)))
    if isinstance(source, Checkpoint):
        for file in sorted(set(source.files.values())):
            digest.update(_stamp(file).encode())
    for text in (prepared.calibration, prepared.heldout):
        digest.update(f"{None if text is None else tuple(text.ids.shape)}".encode())
        if text is not None:
            digest.update(raw_bytes(text.ids))
    return digest.hexdigest()


def candidates_of(prepared: Prepared, cache: Cache) -> Candidates:
    """The candidates of a model on its calibration text, whatever plan they are for.

    Without such a text nothing is kept: what weights alone give is made again as fast as read.
    """
    source, text = original(prepared.source), prepared.calibration
    if text is None or cache.folder is None:
        return Candidates(Cache(None), "")
    said = [__version__, torch.__version__, _code(), dict(source.config), _device(prepared)]
    said.append(told_of(prepared.source))
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode())
    if isinstance(source, Checkpoint):
        for file in sorted(set(source.files.values())):
            digest.update(_content(file, cache).encode())
    else:
        for name in source.tensors:
            digest.update(name.encode())
            digest.update(raw_bytes(source.read(name)))
    digest.update(f"{tuple(text.ids.shape)}".encode())
    digest.update(raw_bytes(text.ids))
    return Candidates(cache, digest.hexdigest())


def _device(prepared: Prepared) -> str:
    return str(prepared.runner.device) if prepared.runner else "cpu"


def _stamp(file: Path) -> str:
    stat = file.stat()
    return f"{file.name} {stat.st_size} {stat.st_mtime_ns}"


def _content(file: Path, cache: Cache) -> str:
    """Digest of a file; known again while the file's size and time stay the same."""
    where = hashlib.sha256(f"file {file.resolve()} {_stamp(file)}".encode()).hexdigest()
    if entry := cache.get(where):
        return entry.facts["sha256"]
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    cache.put(where, {}, {"sha256": digest.hexdigest()})
    return digest.hexdigest()


@functools.cache
def _code() -> str:
    """Digest of layerwise itself: a corrected method must not find what the old one made."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
