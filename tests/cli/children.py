"""Commands in processes of their own, which may be killed.

They are forked from a process that has torch loaded, so that one takes a second, not ten.
"""

import itertools
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["layerwise.cli.commands", "transformers.models.llama.modeling_llama", "cli.children"]
)


@dataclass(frozen=True)
class Fate:
    """What befalls a child.

    Attributes:
        dies_at: Number of the call that changes the disk at which it is killed; 0 for none.
        file_bytes: Most bytes a file may have; 0 for no limit.
        step_bytes: Bytes of a step of weight-only work; 0 for what the library takes.
    """

    dies_at: int = 0
    file_bytes: int = 0
    step_bytes: int = 0


def start(words: Sequence[object], log: Path, fate: Fate = Fate()) -> BaseProcess:
    """Begin `layerwise …` in a process of its own; its output goes to a file."""
    child = FORKED.Process(target=_command, args=([str(word) for word in words], log, fate))
    child.start()
    return child


def run(words: Sequence[object], log: Path, fate: Fate = Fate()) -> int:
    """Run `layerwise …` to its end, or to the child's."""
    return call(_command, [str(word) for word in words], log, fate)


def call(function: Callable[..., object], *args: Any) -> int:
    """Call a function in a child; its exit status, negative for a signal."""
    child = FORKED.Process(target=function, args=args)
    child.start()
    child.join(120)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def events(log: Path) -> int:
    """How many calls that change the disk a child made that ended well."""
    return int(log.with_suffix(".events").read_text())


def count_changes(dies_at: int = 0) -> Callable[[], int]:
    """Count the calls that change the disk, and be killed half-way through one of them."""
    numbers = itertools.count(1)
    made = 0

    def counted(owner: Any, name: str, half: Callable[..., object] | None = None) -> None:
        function = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            made = next(numbers)
            if made == dies_at:
                if half:
                    half(function, *args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        setattr(owner, name, call)

    for name in ("fsync", "rename", "replace", "unlink", "posix_fallocate", "mkdir", "truncate"):
        counted(os, name)
    counted(os, "pwrite", lambda write, file, data, at: write(file, data[: len(data) // 2], at))
    counted(shutil, "copyfile")
    return lambda: made


def _command(words: list[str], log: Path, fate: Fate) -> None:
    import torch

    from layerwise.cli import main
    from layerwise.core.running import stream

    with log.open("w") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    torch.set_num_threads(1)
    if fate.step_bytes:
        stream._STEP_BYTES = fate.step_bytes
    if fate.file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fate.file_bytes, fate.file_bytes))
    made = count_changes(fate.dies_at)
    status = main(words)
    sys.stdout.flush()
    if not status:
        log.with_suffix(".events").write_text(str(made()))
    sys.exit(status)
