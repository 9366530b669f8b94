"""What is tuned once layers are transformed: biases, and what batch norms know of their inputs.

Neither takes a byte more.  A batch norm's mean and variance are those of what it now sees.  A
bias gives back what its layer lost of the mean of its answer, W' for W,

    b' = b + (W - W') E[x]

where a model runs block by block; where it runs as a whole all biases but the last layer's are
moved against the gradient of KL(original, result) of the answers (Hubara et al., 2020;
arXiv:2006.10518).
"""

import contextlib
import functools
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layerwise.core.errors import UserError
from layerwise.core.plan import Plan
from layerwise.core.reading.structure import Layer, Structure, by_input
from layerwise.core.running.carried import Activations
from layerwise.core.running.products import Answer
from layerwise.core.running.runner import Runner

_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
_Product = nn.Linear | nn.Conv2d
# Biases are learned in so many updates, each on so many windows, at a rate that falls to 0.
_STEPS, _WINDOWS, _RATE = 100, 50, 3e-3
_LOOKS = 5
# One window in so many is kept apart, to judge what was learned from the others.
_APART = 8


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was tuned of a block.

    Attributes:
        norms: Batch norms whose statistics were estimated again.
        biases: Biases that were moved.
        kl: KL of the answers on windows kept apart, before biases were learned and after; None
            where they were corrected in one step.
        recovered: Pruned layers that were learned anew, with all vectors of the block.
        error: Mean square of what the block's answer lost on windows kept apart, before and after.
    """

    norms: int = 0
    biases: int = 0
    kl: tuple[float, float] | None = None
    recovered: int = 0
    error: tuple[float, float] = (0.0, 0.0)

    def as_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Tuned":
        """What `as_json` gave."""
        kl, (before, after) = content["kl"], content["error"]
        kept = None if kl is None else (kl[0], kl[1])
        recovered, error = content["recovered"], (before, after)
        return cls(content["norms"], content["biases"], kept, recovered, error)


def told(parts: Iterable[Tuned]) -> list[str]:
    """What was tuned of a model, in words."""
    parts = list(parts)
    norms, biases = sum(one.norms for one in parts), sum(one.biases for one in parts)
    lines: list[str] = []
    if recovered := sum(one.recovered for one in parts):
        before, after = (sum(one.error[place] for one in parts) for place in (0, 1))
        lines.append(
            f"recovered: {recovered} pruned layers, with norms and biases, block by block: errors "
            f"of answers {before:.4g} to {after:.4g} on windows kept apart"
        )
    if norms:
        lines.append(f"tuned: mean and variance of {norms} batch norms, on the calibration data")
    if biases:
        learned = [one.kl for one in parts if one.kl is not None]
        how = (
            f"learned: KL {learned[0][0]:.4g} to {learned[0][1]:.4g} on windows kept apart"
            if learned
            else "each moved by what its layer lost of its mean answer"
        )
        lines.append(f"tuned: {biases} biases, {how}")
    return lines


def check_tuning(runner: Runner, plan: Plan, found: Structure) -> None:
    """Refuse to tune what is not there.

    Raises:
        UserError: The model has no batch norm, or no bias that could be tuned.
    """
    label = runner.source.label
    norms = any(batch_norms(runner, block) for block in runner.blocks)
    if "norms" in plan.tune and not norms:
        raise UserError(f"{label} has no batch norm to tune.", "Leave norms out of --tune.")
    biased = [
        name
        for name, layer in plan.layers.items()
        if layer.steps and bias_of(runner, found.layers[name])
    ]
    if runner.whole:
        biased = [name for name, one in runner.modules("").items() if _has_bias(one)]
    if "bias" in plan.tune and not biased:
        raise UserError(
            f"{label} has no bias to tune: no layer that changes has one.",
            "Leave bias out of --tune.",
        )


def bias_of(runner: Runner, layer: Layer) -> str:
    """The tensor of a layer's bias; "" if it has none."""
    name = f"{layer.name}.bias"
    return name if name in runner.source.tensors else ""


def batch_norms(runner: Runner, block: str) -> dict[str, _BatchNorm]:
    """The batch norms of a block that keep statistics, by name."""
    return {
        name: module
        for name, module in runner.modules(block).items()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def norm_statistics(
    runner: Runner,
    block: str,
    hidden: Activations,
    changed: Mapping[str, Tensor],
    answers: Mapping[str, Answer],
) -> dict[str, Tensor]:
    """Mean and variance of what each batch norm of a block sees, over all windows.

    Meanwhile every norm uses those of the batch, so that one pass serves all of them.

    Args:
        runner: Runs the model.
        block: One of its blocks.
        hidden: What it sees.
        changed: Tensors of the source that are to be used instead, by name.
        answers: What layers answer whose inputs are rounded, by name.

    Returns:
        Tensors of the source, by name.
    """
    norms = batch_norms(runner, block)
    moments = {name: _Moments() for name in norms}
    with contextlib.ExitStack() as watched:
        for name, norm in norms.items():
            watched.enter_context(_by_batch(norm, moments[name]))
        for _ in runner.carry(block, hidden, changed, answers=answers):
            pass
    found: dict[str, Tensor] = {}
    for name, seen in moments.items():
        if seen.count > 1:
            found[f"{name}.running_mean"] = seen.mean.float()
            found[f"{name}.running_var"] = seen.variance.float()
    return found


class _Moments:
    """Adds up what a norm sees, channel by channel."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: Tensor = torch.zeros(())
        self.squares: Tensor = torch.zeros(())

    def see(self, inputs: Float[Tensor, "batch channels *places"]) -> None:
        """Take in a batch."""
        values = inputs.detach().cpu().double().transpose(0, 1).flatten(1)  # (channels, all)
        self.count += values.shape[1]
        self.sum = self.sum + values.sum(dim=1)
        self.squares = self.squares + values.square().sum(dim=1)

    @property
    def mean(self) -> Float[Tensor, " channels"]:
        return self.sum / self.count

    @property
    def variance(self) -> Float[Tensor, " channels"]:
        spread = (self.squares / self.count - self.mean.square()).clamp(min=0)
        return spread * (self.count / (self.count - 1))


@contextlib.contextmanager
def _by_batch(norm: _BatchNorm, moments: _Moments) -> Generator[None]:
    """A norm that goes by each batch's own statistics, keeps none, and shows what it sees."""

    def show(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        moments.see(inputs[0])

    handle = norm.register_forward_pre_hook(show)
    kept, norm.track_running_stats = norm.track_running_stats, False
    norm.training = True
    try:
        yield
    finally:
        norm.training, norm.track_running_stats = False, kept
        handle.remove()


class _Mean:
    """Averages a layer's inputs."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: Tensor = torch.zeros(())

    def see(self, inputs: Float[Tensor, "tokens in"]) -> None:
        """Take in a batch of inputs."""
        self.count += len(inputs)
        self.sum = self.sum + inputs.detach().cpu().double().sum(dim=0)


def input_means(
    runner: Runner, block: str, layers: Sequence[Layer], hidden: Activations
) -> dict[str, Float[Tensor, " in"]]:
    """E[x] of what the layers of a block with a bias read, by `Layer.reads`."""
    biased = [layer for layer in layers if bias_of(runner, layer)]
    watching = {group[0].name: _Mean() for group in by_input(biased).values()}
    for _ in runner.carry(block, hidden, {}, watching) if watching else ():
        pass
    return {
        layer.reads: (watching[layer.name].sum / watching[layer.name].count).float()
        for layer in biased
        if layer.name in watching and watching[layer.name].count
    }


def learned_biases(
    runner: Runner,
    windows: Tensor,
    targets: Tensor,
    changed: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """Biases of a model that runs as a whole, learned from what the original answers.

    Those of its linear layers, convolutions and batch norms are moved by Adam, but for the layer
    that multiplies last; the best on windows that no update sees are kept.  Unlike the paper's,
    the rate is one for all and falls along a cosine.  Inputs that are rounded when the model runs
    are not rounded meanwhile.

    Args:
        runner: Runs the model.
        windows: What it is called with.
        targets: What the original answers to them; logits along the last axis.
        changed: Tensors of the source that are to be used instead, by name.

    Returns:
        The biases by name, and the KL on the windows kept apart before and after.
    """
    last = _last_product(runner, windows[:1], changed)
    start = {
        f"{name}.bias": changed.get(f"{name}.bias", runner.source.read(f"{name}.bias")).float()
        for name, module in runner.modules("").items()
        if _has_bias(module) and name != last
    }
    answer = runner.block_answer("", changed)
    biases = {name: value.clone().to(runner.device) for name, value in start.items()}
    apart = len(windows) // _APART
    seen, unseen = slice(0, len(windows) - apart), slice(len(windows) - apart if apart else 0, None)

    def divergence(chosen: Tensor | slice) -> Tensor:
        made = answer(windows[chosen], biases).log_softmax(dim=-1)
        wanted = targets[chosen].to(made.device).log_softmax(dim=-1)
        return (wanted.exp() * (wanted - made)).sum(dim=-1).mean()

    def judged() -> float:
        with torch.no_grad():
            parts = torch.arange(len(windows))[unseen].split(_WINDOWS)
            return sum(float(divergence(part)) * len(part) for part in parts) / sum(map(len, parts))

    optimizer = torch.optim.Adam(list(biases.values()), lr=_RATE)
    generator = torch.Generator().manual_seed(0)
    before = least = judged()
    kept = start
    for step in range(_STEPS):
        optimizer.param_groups[0]["lr"] = _RATE * (0.5 + 0.5 * math.cos(math.pi * step / _STEPS))
        chosen = torch.randperm(len(windows[seen]), generator=generator)[:_WINDOWS]
        for value in biases.values():
            value.requires_grad_()
        optimizer.zero_grad()
        with torch.enable_grad():
            divergence(chosen).backward()
        optimizer.step()
        if (step + 1) % (_STEPS // _LOOKS) == 0 and (found := judged()) < least:
            least, kept = found, {n: v.detach().cpu().clone() for n, v in biases.items()}
    return kept, (before, least)


def _has_bias(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm | _Product) and module.bias is not None


def _noted(order: list[str], name: str, *_: object) -> None:
    order.append(name)


def _last_product(runner: Runner, window: Tensor, changed: Mapping[str, Tensor]) -> str:
    """The layer that multiplies last."""
    order: list[str] = []
    with contextlib.ExitStack() as watched:
        for name, module in runner.modules("").items():
            if isinstance(module, _Product):
                handle = module.register_forward_hook(functools.partial(_noted, order, name))
                watched.callback(handle.remove)
        runner.forward("", window, changed)
    return order[-1] if order else ""
