"""Weights that are learned: one loop for every method that has parameters to learn.

A method says what a layer's weight, or its codes, are as a function of its parameters; a problem
says what weights cost.  The cost of one layer alone is the error of its output, known from its
gram matrix; that of all layers of a block together is the error of the block's answer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.results import Coded

# How often parameters are looked at for the best: so many times, evenly spaced.
_LOOKS = 8
# One window in so many is kept apart, to judge what was learned from the others.
_APART = 8
# Tokens that a layer alone is shown where it answers in its own way.
_DRAWN = 128


# What a layer answers to its (tokens, in) inputs, (tokens, out), before its bias is added.
LayerAnswer = Callable[[Tensor], Tensor]
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
        warmup: Share of the steps in which the rates rise to their full size first.
    """

    steps: int
    batch: int = 8
    optimizer: Literal["adam", "sign"] = "adam"
    decay: Literal["linear", "cosine"] = "cosine"
    warmup: float = 0.0


class Learnable(ABC):
    """A tensor that is being learned: a layer's weight, or what stands beside it."""

    schedule: Schedule

    @abstractmethod
    def parameters(self) -> Mapping[float, Sequence[Tensor]]:
        """What is learned, by its rate; leaves that ask for gradients."""

    @abstractmethod
    def weight(self) -> Float[Tensor, "..."]:
        """The tensor at the present parameters; differentiable."""

    def stand_in(self) -> Float[Tensor, "..."]:
        """What a problem is given for it."""
        return self.weight()

    def settle(self) -> None:  # noqa: B027
        """Bring parameters back into their range after an update."""


class Learned(Learnable):
    """A layer whose codes are being learned: its weight is as they would have it."""

    @abstractmethod
    def coded(self) -> Coded:
        """The codes at the present parameters: they stand for `weight()`, to the bit."""

    def answering(self) -> LayerAnswer | None:
        """What the layer answers at the present parameters, differentiable.

        None is the product with `weight()`; a layer that rounds its inputs answers in its own way.
        """
        return None

    def share(self, others: "Sequence[Learned]") -> None:
        """Have others of the same class, which read the same input, learn one thing with this."""


@runtime_checkable
class Problem(Protocol):
    """What weights cost."""

    def loss(self, weights: Sequence[Tensor], step: int) -> Tensor:
        """The cost on the examples of a step, differentiable; one weight for each layer."""
        ...

    def judged(self, weights: Sequence[Tensor]) -> float:
        """The cost on examples that no step sees, if there are any."""
        ...


def learn(layers: Sequence[Learnable], problem: Problem) -> tuple[float, float]:
    """Learn the parameters of some layers together, and leave them at their best.

    Args:
        layers: The layers; they have one schedule.
        problem: What their weights cost.

    Returns:
        What they cost before, and what they cost now.
    """
    schedule = layers[0].schedule
    if not schedule.steps:
        return 0.0, 0.0
    # Each once: what layers share is among the parameters of all of them.
    rated: dict[float, dict[int, Tensor]] = {}
    for layer in layers:
        for rate, tensors in layer.parameters().items():
            rated.setdefault(rate, {}).update((id(tensor), tensor) for tensor in tensors)
    groups: list[dict[str, Any]] = [
        {"params": list(tensors.values()), "lr": rate} for rate, tensors in rated.items()
    ]
    optimizer = torch.optim.Adam(groups) if schedule.optimizer == "adam" else _Sign(groups)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, _falling(schedule))
    learned = [tensor for tensors in rated.values() for tensor in tensors.values()]
    best = before = _judged(layers, problem)
    if best == 0:  # nothing is lost, and no gradient points anywhere
        return before, best
    kept = [tensor.detach().clone() for tensor in learned]
    every = max(1, schedule.steps // _LOOKS)
    for step in range(schedule.steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = problem.loss([layer.stand_in() for layer in layers], step)
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
    return before, best


def _judged(layers: Sequence[Learnable], problem: Problem) -> float:
    with torch.no_grad():
        return problem.judged([layer.stand_in() for layer in layers])


def _falling(schedule: Schedule) -> Callable[[int], float]:
    def share(step: int) -> float:
        if step < schedule.warmup * schedule.steps:
            return (step + 1) / (schedule.warmup * schedule.steps + 1)
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


class AnswerError:
    """The error of what one layer answers in its own way, of inputs drawn from their gram matrix.

    An answer that rounds its inputs depends on more than their second moments; those of tokens
    drawn anew for each step from a Gaussian that has them stand in for it.  It is a share of the
    energy of the layer's output.

    Args:
        layer: The layer, which is asked for its answer.
        target: Its weight as it was.
        gram: Mean of x x^T over calibration tokens.
    """

    def __init__(
        self, layer: Learned, target: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]
    ) -> None:
        self.layer, self.target = layer, target
        energies, axes = torch.linalg.eigh(gram.double())
        self.root = (energies.clamp(min=0).sqrt() * axes).T.float()  # (in, in)
        energy = (target @ gram * target).sum()
        self.energy = energy.where(energy > 0, 1.0)

    def loss(self, weights: Sequence[Tensor], step: int) -> Tensor:
        """The error over tokens of this step."""
        return self._error(step + 1)

    def judged(self, weights: Sequence[Tensor]) -> float:
        """The same over tokens that no step sees."""
        return float(self._error(0))

    def _error(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(_DRAWN, len(self.root), generator=generator) @ self.root
        answer = self.layer.answering()
        assert answer is not None
        error = answer(inputs) - inputs @ self.target.T
        return error.square().sum() / len(inputs) / self.energy


class BlockError:
    """The error of a block's answer with all that is learned of it as it is at present.

    Args:
        answer: What the block answers to a batch, as a function of tensors by name.
        stored: The tensors of the source, by name, that the weights of all learned layers make.
        inputs: What the block is to see, window by window.
        targets: What it is to answer.
        batch: Windows that a step sees.
    """

    def __init__(
        self,
        answer: BlockAnswer,
        stored: Callable[[Sequence[Tensor]], Mapping[str, Tensor]],
        inputs: Tensor,
        targets: Tensor,
        batch: int,
    ) -> None:
        self.answer = answer
        self.stored = stored
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
        made = self.answer(self.inputs[windows], self.stored(weights))
        return (made - self.targets[windows].to(made.device)).square().mean()


def learned_alone(layer: Learned, weight: Tensor, gram: Tensor) -> Coded:
    """The codes of one layer, learned from the error of its own output."""
    target, gram = weight.float(), gram.float()
    own = layer.answering() is not None
    learn([layer], AnswerError(layer, target, gram) if own else OutputError(target, gram))
    return layer.coded()


def rounded(values: Tensor) -> Tensor:
    """The nearest whole numbers, with the gradient of the values themselves."""
    return values.round().detach() + (values - values.detach())
