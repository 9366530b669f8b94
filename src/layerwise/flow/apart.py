"""Carry variants of a model through it together, each block read once for all of them."""

import itertools
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from layerwise.core.progress import Progress
from layerwise.core.running.carried import Activations, Shelf
from layerwise.core.running.runner import Runner

# What variants that begin in a block answer there, by their names, from what the original sees.
Begun = Callable[[str, Activations], Mapping[str, Iterable[Tensor]]]


class Apart:
    """Windows after the last block: the original's, and those of each variant.

    A variant is the original but for one block; the blocks after it are the original's.

    Args:
        runner: Runs the original.
        ids: Token ids, (windows, length), or whatever the model takes a batch of.
        begun: Makes the variants that begin in a block.
        shelf: Where activations lie between blocks.
        progress: Is told of each block.

    Attributes:
        names: Of the variants.
    """

    def __init__(
        self, runner: Runner, ids: Tensor, begun: Begun, shelf: Shelf, progress: Progress
    ) -> None:
        progress.stage("probe", len(runner.blocks))
        self.count = len(ids)
        # The original's windows, and after them those of each variant that has begun so far.
        self._carried = shelf.keep("carried", runner.starting(ids), self.count)
        self.names: list[str] = []
        for block in runner.blocks:
            fresh = begun(block, self._carried[: self.count])
            parts = itertools.chain(runner.carry(block, self._carried, {}), *fresh.values())
            self.names += fresh
            windows = self.count * (1 + len(self.names))
            self._carried = shelf.keep("carried", parts, windows)
            progress.step(block)

    @property
    def original(self) -> Tensor:
        """The original's windows."""
        return self._carried[: self.count]

    def of(self, name: str) -> Tensor:
        """Those of a variant."""
        place = self.count * (1 + self.names.index(name))
        return self._carried[place : place + self.count]
