"""What measures of blocks are given: weights, what passes through them, what hangs on them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from layerwise.core import catalogue
from layerwise.core.reading.checkpoint import Source
from layerwise.core.reading.labelled import Labelled
from layerwise.core.reading.structure import Layer
from layerwise.core.running.ablation import (
    ABLATED_WINDOWS,
    ANSWERED,
    EFFECTS,
    LEFT_OUT,
    Ablated,
    Answers,
    ablated,
    answered,
)
from layerwise.core.running.apply import check_finite
from layerwise.core.running.carried import Activations, Shelf
from layerwise.core.running.evidence import UpdateCollector
from layerwise.core.running.jacobian import jacobian
from layerwise.core.running.runner import Runner
from layerwise.flow.preparing import Prepared


@dataclass(frozen=True)
class Whole:
    """What hangs on the whole model: found before the first block is looked at.

    Attributes:
        ids: The windows that it is found on.
        answers: What the model answers to them.
        without: The model without each block, by the evidence that tells of it.
    """

    ids: Tensor
    answers: Answers
    without: Mapping[str, Ablated]


def _whole(
    runner: Runner, calibration: Tensor, measures: Sequence[catalogue.Method], shelf: Shelf
) -> Whole | None:
    """All of it that some measures read; None if they read nothing of it."""
    read = {word for method in measures for word in method.evidence}
    words = {EFFECTS.get(word, word) for word in read}
    if not words & ANSWERED:
        return None
    ids = calibration[:ABLATED_WINDOWS]
    without = {
        word: ablated(runner, ids, mask(ids.shape[1]), shelf, word)
        for word, mask in LEFT_OUT.items()
        if word in words
    }
    answers = next((one.answers() for one in without.values()), None)
    return Whole(ids, answers or answered(runner, ids, shelf), without)


class Probed:
    """Labelled texts on their way through a model.

    Args:
        runner: Runs the model.
        texts: The texts.
        shelf: Where activations lie.
    """

    def __init__(self, runner: Runner, texts: Labelled, shelf: Shelf) -> None:
        self.runner = runner.anew()
        self.texts = texts
        self.shelf = shelf
        parts = self.runner.starting(texts.ids)
        self._hidden = shelf.keep("labelled-start", parts, len(texts.ids))

    def states(self, block: str) -> Tensor:
        """What a block answers at the last token of each text; blocks are asked for in order."""
        parts = self.runner.carry(block, self._hidden, {})
        self._hidden = self.shelf.keep("labelled", parts, len(self._hidden), self._hidden)
        last: list[int] = self.texts.last.tolist()
        return torch.stack([self._hidden[n : n + 1][0, at] for n, at in enumerate(last)])


@dataclass(frozen=True)
class View:
    """One block, and what can be seen of it.

    Attributes:
        source: Has its weights.
        number: Its place among the blocks.
        layers: Its layers.
        norms: The norm of what each of them reads, by name.
        runner: Runs the model; None where weights alone are looked at.
        hidden: What it is given of the calibration text.
        after: What it answers to that.
        whole: What hangs on the whole model.
        states: What it answers to labelled texts.
        labels: Their classes.
        told: What was gathered of it beforehand, by word.
    """

    source: Source
    number: int
    layers: Sequence[Layer]
    norms: Mapping[str, Any]
    runner: Runner | None = None
    hidden: Activations | None = None
    after: Activations | None = None
    whole: Whole | None = None
    states: Tensor | None = None
    labels: Tensor | None = None
    told: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def of(self, method: catalogue.Method) -> dict[str, Any]:
        """The evidence that a measure reads."""
        return {
            word: self.told[word] if word in self.told else _WORDS[word](self)
            for word in method.evidence
        }

    def updates(self) -> tuple[Tensor, ...]:
        """What the block adds to the residual stream."""
        assert self.runner is not None
        assert self.hidden is not None
        block = self.runner.blocks[self.number]
        collector = UpdateCollector(block)
        for _ in self.runner.carry(block, self.hidden, {}, updates=collector):
            pass
        return collector.evidence()["updates"]

    def jacobian(self) -> Callable[[Tensor], Tensor]:
        """The derivative of what it answers along a direction of what it is given."""
        assert self.runner is not None
        assert self.hidden is not None
        return jacobian(self.runner, self.runner.blocks[self.number], self.hidden)

    def lens(self) -> Answers:
        """What the model would answer if its stream ended before the block."""
        assert self.hidden is not None
        found = self.about
        answers, hidden = found.answers, self.hidden[: len(found.ids)]
        return Answers(answers.runner, hidden, found.ids, answers.outer)

    def without(self, word: str) -> Answers:
        """What it answers without the block."""
        return self.about.without[word].answers(self.number)

    def effects(self, word: str) -> Tensor:
        """What becomes of later blocks without the block."""
        return self.about.without[EFFECTS[word]].effect(self.number)

    @property
    def about(self) -> Whole:
        """What hangs on the whole model, which was asked for."""
        assert self.whole is not None
        return self.whole


class Views:
    """What measures of blocks are given, block after block.

    Args:
        prepared: The model.
        runner: Runs it; None where weights alone are looked at.
        measures: The measures; what none of them reads is not gathered.
        shelf: Where activations lie.
        told: What was gathered beforehand, by word and then by block.
    """

    def __init__(
        self,
        prepared: Prepared,
        runner: Runner | None,
        measures: Sequence[catalogue.Method],
        shelf: Shelf,
        told: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.source = prepared.source
        words = {word for method in measures for word in method.evidence}
        self.told = {word: told[word] for word in words if word in told}
        self.runner = runner
        self.texts = prepared.labelled
        self.whole = self.probed = None
        if runner is not None and prepared.calibration is not None:
            self.whole = _whole(runner, prepared.calibration.ids, measures, shelf)
        if runner is not None and prepared.labelled is not None:
            self.probed = Probed(runner, prepared.labelled, shelf)

    def at(
        self,
        number: int,
        block: str,
        layers: Sequence[Layer],
        norms: Mapping[str, Any],
        hidden: Activations | None,
        after: Activations | None,
    ) -> View:
        """A block: its number and name, its layers, what they read, what goes in and out."""
        states = labels = None
        if self.probed is not None and self.runner is not None:
            states = self.probed.states(self.runner.blocks[number])
            labels = self.probed.texts.labels
        parts = (norms, self.runner, hidden, after, self.whole, states, labels)
        told = {word: found[block] for word, found in self.told.items()}
        return View(self.source, number, layers, *parts, told)


def weight_of(source: Source, layer: Layer) -> Tensor:
    """A layer's weight in float32, as a copy."""
    weight = layer.matrix(source.read(layer.tensor)).to(torch.float32, copy=True).contiguous()
    check_finite(layer.tensor, weight)
    return weight


def _tokens(states: Activations | None) -> Tensor:
    assert states is not None
    return states[:].flatten(0, -2)


def _positions(states: Activations | None) -> Tensor:
    assert states is not None
    return torch.arange(states.shape[1]).repeat(len(states))


def _word(ask: Callable[[View, str], Any], word: str) -> Callable[[View], Any]:
    return lambda view: ask(view, word)


_WORDS: Mapping[str, Callable[[View], Any]] = {
    "weights": lambda view: [weight_of(view.source, layer) for layer in view.layers],
    "norms": lambda view: [view.norms[layer.name] for layer in view.layers],
    "inputs": lambda view: _tokens(view.hidden),
    "outputs": lambda view: _tokens(view.after),
    "positions": lambda view: _positions(view.hidden),
    "updates": View.updates,
    "jacobian": View.jacobian,
    "ids": lambda view: view.about.ids,
    "answers": lambda view: view.about.answers,
    "lens": View.lens,
    "states": lambda view: view.states,
    "labels": lambda view: view.labels,
    **{word: _word(View.without, word) for word in LEFT_OUT},
    **{word: _word(View.effects, word) for word in EFFECTS},
}
