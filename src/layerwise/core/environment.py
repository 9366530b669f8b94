"""What a run was made with, so that a reader can tell why another gave other figures."""

import datetime
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

from layerwise import __version__

_PACKAGES = ("torch", "transformers", "safetensors", "numpy")
_PROCESSOR = Path("/proc/cpuinfo")


def environment(device: str) -> Mapping[str, str]:
    """Versions, machine and date, by name; a package that is not installed is left out.

    Args:
        device: Where the blocks were run.
    """
    return {
        "layerwise": __version__,
        "python": platform.python_version(),
        **_versions(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "device": _device(device),
        "threads": str(torch.get_num_threads()),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    """The processor's name; Python's own answer is empty on Linux."""
    lines = _PROCESSOR.read_text().splitlines() if _PROCESSOR.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _device(device: str) -> str:
    return f"cuda ({torch.cuda.get_device_name()})" if device.startswith("cuda") else device
