"""What an earlier run found out, kept on disk under a digest of all that it depends on."""

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from layerwise.core.errors import UserError


def folder(kind: str) -> Path:
    """Where entries of a kind are kept.

    `$LAYERWISE_CACHE/KIND`, or `layerwise/KIND` in `$XDG_CACHE_HOME`, which is `~/.cache` unless it
    is set.  Made if it is not there.

    Raises:
        UserError: It cannot be written.
    """
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("LAYERWISE_CACHE") or Path(shared) / "layerwise").expanduser()
    place = root / kind
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(
            f"the cache {place} cannot be written: {error.strerror}.",
            "Set LAYERWISE_CACHE to another directory, or give --no-cache.",
        ) from error
    return place


def fetch(place: Path, key: str) -> Any | None:
    """What is kept under a key: plain data; None if there is nothing, or it is damaged."""
    try:
        content = json.loads((place / f"{key}.json").read_bytes())
        body, digest = content["body"], content["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return body if digest == _digest(key, body) else None


def keep(place: Path, key: str, body: Any) -> None:
    """Keep plain data under a key; whoever reads at the same time sees all of it or nothing."""
    content = json.dumps({"sha256": _digest(key, body), "body": body})
    handle, name = tempfile.mkstemp(dir=place, suffix=".partial")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(content)
        Path(name).replace(place / f"{key}.json")
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def _digest(key: str, body: Any) -> str:
    return hashlib.sha256(json.dumps([key, body], sort_keys=True).encode()).hexdigest()
