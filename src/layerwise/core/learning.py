"""Codes that are learned: one loop for every method that has parameters to learn.

A learned method says what a layer's weight is as a function of its parameters; a problem says what
weights cost.  The cost of one layer alone is the error of its output, known from its gram matrix;
that of all layers of a block together is the error of the block's answer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.results import Coded
from layerwise.core.structure import Layer

# How often parameters are looked at for the best: so many times, evenly spaced.
_LOOKS = 8
# One window in so many is kept apart, to judge what was learned from the others.
_APART = 8


# What a block answers to a batch, with some tensors of the source, by name, for its own.
BlockAnswer = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True, slots=True)
class Schedule:
    """How parameters are learned.

    Attributes:
        steps: Updates.
        batch: Windows that each update sees.
        optimizer: Adam, or each parameter's rate times the sign of its gradient.
        decay: What the rates fall along, down to 0 after the last step.
    """

    steps: int
    batch: int = 8
    optimizer: Literal["adam", "sign"] = "adam"
    decay: Literal["linear", "cosine"] = "cosine"


class Learned(ABC):
    """A layer whose codes are being learned."""

    schedule: Schedule

    @abstractmethod
    def parameters(self) -> Mapping[float, Sequence[Tensor]]:
        """What is learned, by its rate; leaves that ask for gradients."""

    @abstractmethod
    def weight(self) -> Float[Tensor, "out in"]:
        """What multiplies the layer's input, as its codes would have it; differentiable."""

    @abstractmethod
    def coded(self) -> Coded:
        """The codes at the present parameters: they stand for `weight()`, to the bit."""

    def settle(self) -> None:  # noqa: B027
        """Bring parameters back into their range after an update."""


@runtime_checkable
class Problem(Protocol):
    """What weights cost."""

    def loss(self, weights: Sequence[Tensor], step: int) -> Tensor:
        """The cost on the examples of a step, differentiable; one weight for each layer."""
        ...

    def judged(self, weights: Sequence[Tensor]) -> float:
        """The cost on examples that no step sees, if there are any."""
        ...


def learn(layers: Sequence[Learned], problem: Problem) -> None:
    """Learn the parameters of some layers together, and leave them at their best.

    Args:
        layers: The layers; they have one schedule.
        problem: What their weights cost.
    """
    schedule = layers[0].schedule
    if not schedule.steps:
        return
    rated: dict[float, list[Tensor]] = {}
    for layer in layers:
        for rate, tensors in layer.parameters().items():
            rated.setdefault(rate, []).extend(tensors)
    groups: list[dict[str, Any]] = [
        {"params": tensors, "lr": rate} for rate, tensors in rated.items()
    ]
    optimizer = torch.optim.Adam(groups) if schedule.optimizer == "adam" else _Sign(groups)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, _falling(schedule))
    learned = [tensor for tensors in rated.values() for tensor in tensors]
    best = _judged(layers, problem)
    if not best:
        return  # nothing is lost, and a share of nothing has no gradient
    kept = [tensor.detach().clone() for tensor in learned]
    every = max(1, schedule.steps // _LOOKS)
    for step in range(schedule.steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = problem.loss([layer.weight() for layer in layers], step)
            # Of no size: what it is learned from has the size of whatever the layer answers.
            (loss / loss.detach().clamp(min=torch.finfo(loss.dtype).tiny)).backward()
        optimizer.step()
        falling.step()
        for layer in layers:
            layer.settle()
        if (step + 1) % every == 0 or step + 1 == schedule.steps:
            found = _judged(layers, problem)
            if found < best:
                best, kept = found, [tensor.detach().clone() for tensor in learned]
    with torch.no_grad():
        for tensor, value in zip(learned, kept, strict=True):
            tensor.copy_(value)


def _judged(layers: Sequence[Learned], problem: Problem) -> float:
    with torch.no_grad():
        return problem.judged([layer.weight() for layer in layers])


def _falling(schedule: Schedule) -> Callable[[int], float]:
    def share(step: int) -> float:
        left = 1 - step / schedule.steps
        if schedule.decay == "linear":
            return left
        return 0.5 - 0.5 * float(torch.cos(torch.tensor(left * torch.pi)))

    return share


class _Sign(torch.optim.Optimizer):
    """Moves every parameter by its rate, against the sign of its gradient."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    tensor.sub_(tensor.grad.sign_(), alpha=group["lr"])


@dataclass(frozen=True)
class OutputError:
    """The error of one layer's output, as a share of its energy: tr(E G E^T) / tr(W G W^T).

    Attributes:
        weight: The layer as it was.
        gram: Mean of x x^T over calibration tokens.
    """

    target: Float[Tensor, "out in"]
    gram: Float[Tensor, "in in"]

    def loss(self, weights: Sequence[Tensor], step: int) -> Tensor:
        """The same at every step: all tokens are in the gram matrix."""
        error = weights[0] - self.target
        energy = (self.target @ self.gram * self.target).sum()
        return (error @ self.gram * error).sum() / energy.clamp(min=torch.finfo(torch.float32).tiny)

    def judged(self, weights: Sequence[Tensor]) -> float:
        """The same again."""
        return float(self.loss(weights, 0))


class BlockError:
    """The error of a block's answer with all of its learned layers at their present weights.

    Args:
        answer: What the block answers to a batch, as a function of tensors by name.
        layers: The layers that are learned, in the order of their weights.
        shapes: The shapes of their tensors.
        inputs: What the block is to see, window by window.
        targets: What it is to answer.
        batch: Windows that a step sees.
    """

    def __init__(
        self,
        answer: BlockAnswer,
        layers: Sequence[Layer],
        shapes: Sequence[tuple[int, ...]],
        inputs: Tensor,
        targets: Tensor,
        batch: int,
    ) -> None:
        self.answer = answer
        self.layers = layers
        self.shapes = shapes
        self.inputs = inputs
        self.targets = targets
        apart = len(inputs) // _APART
        self.seen, self.unseen = range(len(inputs) - apart), range(len(inputs) - apart, len(inputs))
        self.batch = min(batch, len(self.seen))
        self.generator = torch.Generator().manual_seed(0)

    def loss(self, weights: Sequence[Tensor], step: int) -> Tensor:
        """Mean square of the error over a few windows, drawn anew for each step."""
        chosen = torch.randperm(len(self.seen), generator=self.generator)[: self.batch]
        return self._error(weights, chosen)

    def judged(self, weights: Sequence[Tensor]) -> float:
        """The same over windows that no step sees; over all, where there are few."""
        windows = torch.tensor(self.unseen or self.seen)
        parts = [
            float(self._error(weights, part)) * len(part) for part in windows.split(self.batch)
        ]
        return sum(parts) / len(windows)

    def _error(self, weights: Sequence[Tensor], windows: Tensor) -> Tensor:
        tensors = {
            layer.tensor: layer.store(weight, shape)
            for layer, weight, shape in zip(self.layers, weights, self.shapes, strict=True)
        }
        made = self.answer(self.inputs[windows], tensors)
        return (made - self.targets[windows].to(made.device)).square().mean()


def learned_alone(layer: Learned, weight: Tensor, gram: Tensor) -> Coded:
    """The codes of one layer, learned from the error of its own output."""
    learn([layer], OutputError(weight.float(), gram.float()))
    return layer.coded()


def rounded(values: Tensor) -> Tensor:
    """The nearest whole numbers, with the gradient of the values themselves."""
    return values.round().detach() + (values - values.detach())
