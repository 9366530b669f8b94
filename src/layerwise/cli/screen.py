"""The terminal: human output goes to stderr, and bars know when there is no terminal."""

import functools
import os
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)


@functools.cache
def console() -> Console:
    """Where people read."""
    return _wide(stderr=True)


@functools.cache
def answer() -> Console:
    """Where what was asked for is printed, when it is not a JSON document."""
    return _wide(stderr=False)


class _Console(Console):
    """Falls silent when nobody reads any more: that is no reason to stop the work."""

    def on_broken_pipe(self) -> None:
        """Print nothing from now on."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def _wide(*, stderr: bool) -> Console:
    found = _Console(stderr=stderr, highlight=False)
    # Without a terminal rich assumes 80 columns, which cuts the names of layers.
    return found if found.is_terminal else _Console(stderr=stderr, highlight=False, width=200)


class Bars:
    """A bar per stage on a terminal; a line per stage elsewhere."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description:12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[at]}"),
            console=console(),
            disable=not console().is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> "Bars":
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def stage(self, name: str, steps: int) -> None:
        """A stage with so many steps begins."""
        self._task = self._bars.add_task(name, total=steps, at="")
        if not console().is_terminal:
            console().print(f"{name}: {steps} steps", markup=False)

    def step(self, what: str) -> None:
        """One step is done."""
        if self._task is not None:
            self._bars.update(self._task, advance=1, at=what)

    def tell(self, line: str) -> None:
        """Print a line above the bars."""
        console().print(line, markup=False)
