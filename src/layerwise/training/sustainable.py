"""Adversarial training that holds a network's most vulnerable layers still.

Khalooei et al. 2022 (arXiv:2202.02626): AT-LR.  Beside the loss of an attacked input stands how far
chosen layers move from what they answer to the clean one:

    min over theta of  J(theta, x', y) + gamma sum over l in MVL of CM_l(x, x')
    CM_l = mean over inputs of ||phi_l(x) - phi_l(x')||_2 / ||phi_l(x)||_2

with x' an attack on x (`attack`), and MVL the layers that move most (`most_vulnerable`).
"""

import contextlib
import statistics
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from layerwise.core.errors import UserError

# A layer that answers less than this to an input answers nothing.
_LEAST = 1e-8


def attack(
    model: nn.Module,
    inputs: Float[Tensor, "examples ..."],
    labels: Int64[Tensor, " examples"],
    *,
    radius: float,
    step: float,
    steps: int = 10,
    low: float = 0.0,
    high: float = 1.0,
) -> Float[Tensor, "examples ..."]:
    """Inputs nearby that raise the loss: projected gradient descent in the largest norm.

        z <- clamp(z + step sign(d J / d z)) within `radius` of x, and from `low` to `high`

    Madry et al. 2018 (arXiv:1706.06083), from x itself.  The model is in evaluation mode
    meanwhile; its gradients are left as they are.

    Args:
        model: Answers with logits of classes.
        inputs: x.
        labels: Their classes.
        radius: How far an entry may be moved.
        step: By how much in each step.
        steps: How many; 1 of the size of the radius is FGSM.
        low: Least entry.
        high: Largest entry.
    """
    parameters = [one for one in model.parameters() if one.requires_grad]
    moved = inputs.detach().clone()
    with _evaluated(model), torch.enable_grad():
        for one in parameters:
            one.requires_grad_(False)
        try:
            for _ in range(steps):
                moved.requires_grad_()
                loss = functional.cross_entropy(model(moved), labels)
                (slope,) = torch.autograd.grad(loss, moved)
                near = (moved.detach() + step * slope.sign() - inputs).clamp(-radius, radius)
                moved = (inputs + near).clamp(low, high).detach()
        finally:
            for one in parameters:
                one.requires_grad_()
    return moved


def changes(
    model: nn.Module, inputs: Tensor, moved: Tensor, layers: Sequence[str]
) -> tuple[Tensor, dict[str, Float[Tensor, ""]]]:
    """What a model answers to moved inputs, and how far layers move with them.

    Gradients flow through both.  A module that is called several times counts with each call's
    answer after the other.  A layer that answers nothing to an input counts as moved by nothing if
    it still does.

    Args:
        model: The model, in the mode in which it is to run both.
        inputs: x, (examples, ...).
        moved: x', the same shape.
        layers: Names of modules; none for the answer alone, with one pass.

    Returns:
        The answer to `moved`, and CM of each layer by name.

    Raises:
        UserError: There is no such module, or it was not called.
    """
    if not layers:
        return model(moved), {}
    with _heard(model, layers) as clean:
        model(inputs)
    with _heard(model, layers) as after:
        answer = model(moved)
    found: dict[str, Tensor] = {}
    for name in layers:
        if not clean[name]:
            raise UserError(
                f"{name} answered nothing as the model ran.", "Name modules that are called."
            )
        pairs = zip(clean[name], after[name], strict=True)
        each = [_change(before, now) for before, now in pairs]
        found[name] = torch.stack(each).mean()
    return answer, found


def objective(
    model: nn.Module,
    inputs: Float[Tensor, "examples ..."],
    labels: Int64[Tensor, " examples"],
    moved: Float[Tensor, "examples ..."],
    layers: Sequence[str],
    *,
    gamma: float = 0.1,
) -> Float[Tensor, ""]:
    """The loss of AT-LR: that of the attacked inputs, and what layers move, weighed by gamma.

    With gamma 0 it is that of plain adversarial training.  The paper does not say gamma; 0.1 is
    ours.  It holds layers relative to what they answer, so a network can also grow its answers:
    look at what they move absolutely too.

    Args:
        model: Answers with logits of classes.
        inputs: x.
        labels: Their classes.
        moved: x', the attack on x.
        layers: Names of the modules that are held.
        gamma: How much that counts.
    """
    answer, found = changes(model, inputs, moved, layers if gamma else ())
    loss = functional.cross_entropy(answer, labels)
    return loss + gamma * torch.stack(list(found.values())).sum() if found else loss


def most_vulnerable(moved: Mapping[str, float], *, above: float = 0.0) -> list[str]:
    """The layers that move more than the mean over all, by so many deviations.

    The paper's exact line is not known to us: the mean itself is ours.

    Args:
        moved: CM of each layer, as floats.
        above: Deviations above the mean.
    """
    values = list(moved.values())
    if not values:
        return []
    line = statistics.fmean(values) + above * statistics.pstdev(values)
    return [name for name, value in moved.items() if value > line]


def _change(before: Tensor, after: Tensor) -> Float[Tensor, ""]:
    clean, moved = before.flatten(1), after.flatten(1)
    # The square root has no slope at 0.
    gap = (clean - moved).square().sum(dim=1).clamp(min=_LEAST**2).sqrt()
    gap = torch.where((clean == moved).all(dim=1), torch.zeros_like(gap), gap)
    return (gap / clean.norm(dim=1).clamp(min=_LEAST)).mean()


@contextlib.contextmanager
def _heard(model: nn.Module, layers: Sequence[str]) -> Generator[dict[str, list[Tensor]]]:
    """What some modules answer, call by call."""
    known = dict(model.named_modules())
    if absent := [name for name in layers if name not in known]:
        raise UserError(
            f"{type(model).__name__} has no module {absent[0]}.",
            f"Name some of {', '.join(list(known)[1:6])}.",
        )
    heard: dict[str, list[Tensor]] = {name: [] for name in layers}

    def listener(name: str) -> Callable[..., None]:
        def listen(_: nn.Module, __: Any, answer: Tensor) -> None:
            # A module that works in place would write over what was kept.
            heard[name].append(answer.clone())

        return listen

    hooks = [known[name].register_forward_hook(listener(name)) for name in layers]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Generator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
