"""What becomes of a model without one of its blocks, for each of them in turn.

A block is left out for some tokens of each window: what it is given there passes by it unchanged.
Other tokens still see those tokens in its attention, as they would have.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.running.carried import Activations, Shelf
from layerwise.core.running.runner import Runner

# Windows of the calibration text that blocks are left out on.
ABLATED_WINDOWS = 16


def _all(length: int) -> Bool[Tensor, " length"]:
    return torch.ones(length, dtype=torch.bool)


def _but_first(length: int) -> Bool[Tensor, " length"]:
    return torch.arange(length) > 0


def _first_half(length: int) -> Bool[Tensor, " length"]:
    return _but_first(length) & (torch.arange(length) < length // 2)


# For which tokens of a window a block is left out, by the evidence that tells of it.  The first
# token is where attention goes that goes nowhere: without its block nothing else may be as it was.
LEFT_OUT: Mapping[str, Callable[[int], Bool[Tensor, " length"]]] = MappingProxyType(
    {"removed": _all, "skipped": _but_first, "frozen": _first_half}
)


# Evidence that is made of a model's answers, or of runs without a block.
ANSWERED = frozenset({"answers", "lens", *LEFT_OUT})
EFFECTS: Mapping[str, str] = MappingProxyType(
    {"skip_effects": "skipped", "freeze_effects": "frozen"}
)


@dataclass(frozen=True)
class Answers:
    """Log-probabilities of the next token, (windows, length, vocabulary) batch after batch.

    They are made each time they are read, and no more than one batch is held.
    """

    runner: Runner
    hidden: Activations
    ids: Tensor
    outer: dict[str, Tensor]

    def __iter__(self) -> Iterator[Float[Tensor, "windows length vocabulary"]]:
        for logits in self.runner.logits(self.hidden, self.ids, {}, self.outer):
            if logits.dim() != 3:
                raise UserError(
                    f"{self.runner.source.label} answers with a tensor of shape "
                    f"{tuple(logits.shape)}, not with a distribution for each token.",
                    "Use a measure that reads no answers, such as lim.",
                )
            yield logits.float().log_softmax(dim=-1)


@dataclass(frozen=True)
class Ablated:
    """A model without each of its blocks.

    Attributes:
        runner: Runs it.
        ids: The windows that it read.
        after: What came out of the last block: of the model as it is, then without each block.
        effects: For each block, by how much what a later block adds to the stream changes without
            it, as a share of what that adds else: one (windows, length) for each later block.
        outer: The parameters outside the blocks.
    """

    runner: Runner
    ids: Tensor
    after: Activations
    effects: Sequence[Sequence[Float[Tensor, "windows length"]]]
    outer: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def answers(self, without: int | None = None) -> Answers:
        """What the model answers, or what it would without the block of a number."""
        count = len(self.ids)
        place = 0 if without is None else 1 + without
        hidden = self.after[place * count : (place + 1) * count]
        return Answers(self.runner, hidden, self.ids, self.outer)

    def effect(self, without: int) -> Float[Tensor, "later windows length"]:
        """The effects of a block of a number."""
        found = list(self.effects[without])
        return torch.stack(found) if found else torch.zeros(0, *self.ids.shape[:2])


def ablated(
    runner: Runner,
    ids: Tensor,
    left_out: Bool[Tensor, "*windows length"],
    shelf: Shelf = Shelf(),  # noqa: B008
    name: str = "ablated",
) -> Ablated:
    """Run a model without each of its blocks, all of these together.

    Each block is read once.  It runs the windows of the model as it is, and those of the model
    without each earlier block: half the windows times the square of the number of blocks in all,
    and activations of all of them are held.

    Args:
        runner: Runs the model; block by block.
        ids: Token ids, (windows, length).
        left_out: For which tokens a block is left out, of all windows alike or of each.
        shelf: Where activations lie.
        name: What they are called there.
    """
    count = len(ids)
    before = shelf.keep(f"{name}-0", runner.starting(ids), count)
    effects: list[list[Tensor]] = [[] for _ in runner.blocks]
    for number, block in enumerate(runner.blocks):
        parts = _through(runner, block, before, count, left_out)
        after = shelf.keep(f"{name}-{(number + 1) % 2}", parts, count * (2 + number))
        added = after[:count] - before[:count]  # (windows, length, width)
        size = added.norm(dim=-1).clamp(min=1e-6)
        for earlier in range(number):
            part = slice(count * (1 + earlier), count * (2 + earlier))
            changed = (after[part] - before[part] - added).norm(dim=-1)
            effects[earlier].append(changed / size)
        before = after
    return Ablated(runner, ids, before, effects, runner.outer())


def answered(
    runner: Runner,
    ids: Tensor,
    shelf: Shelf = Shelf(),  # noqa: B008
) -> Answers:
    """What a model as it is answers, run once."""
    hidden = shelf.keep("answered-0", runner.starting(ids), len(ids))
    for number, block in enumerate(runner.blocks, 1):
        parts = runner.carry(block, hidden, {})
        hidden = shelf.keep(f"answered-{number % 2}", parts, len(ids), hidden)
    return Answers(runner, hidden, ids, runner.outer())


def _through(
    runner: Runner, block: str, before: Activations, count: int, left_out: Tensor
) -> Iterator[Tensor]:
    """What comes out of a block for all that is carried, and then as if it were not there."""
    original: list[Tensor] = []
    seen = 0
    for part in runner.carry(block, before, {}):
        if seen < count:
            original.append(part[: count - seen])
        seen += len(part)
        yield part
    yield torch.where(left_out[..., None], before[:count], torch.cat(original))
