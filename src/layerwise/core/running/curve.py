"""A curve of networks between two, trained so that the loss on it is low."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

# Where a curve is looked at.
POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_MOMENTUM, _DECAY = 0.9, 5e-4
Network = Mapping[str, Tensor]
# The mean loss of a network on some examples, by their numbers.
Loss = Callable[[Network, Int64[Tensor, " examples"]], Tensor]


def on_curve(first: Network, middle: Network, last: Network, point: float) -> dict[str, Tensor]:
    """The network at a point of a quadratic Bezier curve.

    w(t) = (1 - t)^2 A + 2 t (1 - t) M + t^2 C
    """
    parts = ((1 - point) ** 2, 2 * point * (1 - point), point**2)
    return {
        name: parts[0] * first[name] + parts[1] * middle[name] + parts[2] * last[name]
        for name in first
    }


def bent(
    loss: Loss,
    first: Network,
    last: Network,
    examples: int,
    *,
    batch: int,
    epochs: int = 10,
    rate: float = 0.1,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The middle M of a curve between two networks whose loss was made low all along it.

    Garipov et al. 2018 (arXiv:1802.10026), with the settings of the official code of Yang et al.
    2021 (arXiv:2107.11228): M begins half-way; each step draws t evenly from 0 to 1 and goes down
    the loss of w(t) by SGD with momentum 0.9 and a decay of 5e-4 of w(t), at a rate that is
    constant for half of the steps, falls evenly to 1% at 90% of them, and stays there.

    Args:
        loss: Of a network on some examples; it passes gradients on.
        first: A, its tensors by name, float32.
        last: C, the same.
        examples: How many there are.
        batch: Examples of a step.
        epochs: How often each example is seen.
        rate: Of learning, at first.
        seed: Of the order of examples and the points.
    """
    middle = {name: ((one + last[name]) / 2).requires_grad_() for name, one in first.items()}
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(list(middle.values()), lr=rate, momentum=_MOMENTUM)
    orders = (torch.randperm(examples, generator=generator) for _ in range(epochs))
    parts = [part for order in orders for part in order.split(batch)]
    with torch.enable_grad():
        for step, part in enumerate(parts):
            for group in optimizer.param_groups:
                group["lr"] = rate * _share(step / len(parts))
            here = on_curve(first, middle, last, float(torch.rand((), generator=generator)))
            size = torch.stack([one.square().sum() for one in here.values()]).sum()
            optimizer.zero_grad()
            (loss(here, part) + _DECAY / 2 * size).backward()
            optimizer.step()
    return {name: one.detach() for name, one in middle.items()}


def along(loss: Loss, curve: Sequence[Network], examples: int, *, batch: int) -> list[float]:
    """The mean loss at each of `POINTS` of a curve, given as its two ends and what lies between."""
    first, middle, last = curve
    found: list[float] = []
    with torch.no_grad():
        for point in POINTS:
            here = on_curve(first, middle, last, point)
            parts = torch.arange(examples).split(batch)
            found.append(sum(float(loss(here, part)) * len(part) for part in parts) / examples)
    return found


def _share(gone: float) -> float:
    """The share of the rate that is left."""
    if gone <= 0.5:
        return 1.0
    return max(0.01, 1.0 - (gone - 0.5) / 0.4 * 0.99)
