"""layerwise and a peer in turn on the same files, each run a process of its own.

What the scripts beside this one share: an environment for the peer, runs, and the ratio of what
both took.  A run's processor time and its peak of memory are the kernel's counts; private memory
(anonymous pages) is looked at every 20 ms.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# The build for processors lies on a machine without a GPU; the packages' own choice is gigabytes.
TORCH = "torch==2.13.0"


@dataclass(frozen=True, slots=True)
class Used:
    """What a run took: seconds on the wall, seconds of processors, bytes."""

    wall: float
    cpu: float
    peak: int
    private: int


def environment(folder: Path, *packages: str) -> Path:
    """The directory of programs of an environment with these packages, made unless it is there."""
    ready = folder / ".ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(folder / "bin" / "pip"), "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*install, TORCH], check=True)
        subprocess.run([*install, *packages], check=True)
        ready.touch()
    return folder / "bin"


def run(command: Sequence[str], out: Path | None = None, threads: int = 0) -> Used:
    """Run a command, once what it is to write is gone; 0 threads are as many as it wants.

    Raises:
        SystemExit: It failed.
    """
    if out is not None:
        shutil.rmtree(out, ignore_errors=True) if out.is_dir() else out.unlink(missing_ok=True)
    shown = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    log = Path(f"/tmp/layerwise-benchmark-{os.getpid()}.log")
    begun, private = time.perf_counter(), 0
    with log.open("w") as told:
        process = subprocess.Popen(command, stdout=told, stderr=told, env=shown)
        while True:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            private = max(private, _private(process.pid))
            time.sleep(0.02)
    wall = time.perf_counter() - begun
    if status:
        sys.exit(f"{' '.join(command[:3])} failed:\n{log.read_text()[-4000:]}")
    log.unlink()
    return Used(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, private)


def _private(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def in_turn(
    runs: Mapping[str, Sequence[str]], repeats: int, out: Path | None = None, threads: int = 0
) -> dict[str, list[Used]]:
    """Every command `repeats` times, one after the other in each round; a line for each run."""
    print(f"{'run':24}{'wall s':>9}{'CPU s':>9}{'peak MB':>9}{'private MB':>12}")
    found: dict[str, list[Used]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, command in runs.items():
            one = run(command, out, threads)
            found[name].append(one)
            sizes = f"{one.peak / 1e6:9.0f}{one.private / 1e6:12.0f}"
            print(f"{name:24}{one.wall:9.2f}{one.cpu:9.2f}{sizes}", flush=True)
    return found


def print_ratios(found: Mapping[str, Sequence[Used]], ours: str, peer: str) -> None:
    """What ours took of what the peer took in the same round: the median, the least, the most."""
    kinds: dict[str, Callable[[Used], float]] = {
        "CPU seconds": lambda one: one.cpu,
        "wall seconds": lambda one: one.wall,
        "peak memory": lambda one: one.peak,
        "private memory": lambda one: one.private,
    }
    for kind, of in kinds.items():
        parts = [of(one) / of(other) for one, other in zip(found[ours], found[peer], strict=True)]
        middle = statistics.median(parts)
        print(f"{ours} / {peer}, {kind}: {middle:.3f} ({min(parts):.3f} to {max(parts):.3f})")
