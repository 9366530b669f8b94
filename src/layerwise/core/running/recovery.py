"""Pruned layers that are learned anew, from what their block answered before.

Layers are pruned one by one; what all of them lost together is seen in the block's answer.  With X
what the block sees after earlier blocks were pruned, W its weights, M their masks:

    least mean over X of ||block(X; W' with W' = 0 where M = 0) - block(X; W)||^2

A method says what a pruned weight is while it is learned; all gains and biases of the block are
learned beside it.  Nothing is added to the model, and what was pruned stays 0.0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Method
from layerwise.core.learning import BlockError, Learnable, Schedule, learn
from layerwise.core.plan import Plan, recovering
from layerwise.core.running.apply import Transformed
from layerwise.core.running.joint import stored_as
from layerwise.core.running.runner import Runner

_VECTORS = (".weight", ".bias")


def recovers(plan: Plan, result: Transformed) -> bool:
    """Whether a layer is learned anew: an expert, which few tokens see, is not."""
    layer = result.layer
    alone = layer.expert is not None or "experts." in layer.name
    return bool(recovering(plan.recover)) and result.plan.recoverable and not alone


@dataclass(frozen=True)
class _Vector(Learnable):
    """A norm's gains, or biases, as they are learned."""

    value: Float[Tensor, " entries"]
    rate: float
    schedule: Schedule

    def parameters(self) -> Mapping[float, Sequence[Tensor]]:
        return {self.rate: [self.value]}

    def weight(self) -> Float[Tensor, " entries"]:
        return self.value


def recovered(
    runner: Runner,
    block: str,
    pruned: Sequence[Transformed],
    method: Method,
    options: Mapping[str, Mapping[str, Any]],
    *,
    inputs: Tensor,
    targets: Tensor,
    changed: Mapping[str, Tensor],
) -> tuple[list[Transformed], dict[str, Tensor], tuple[float, float]]:
    """Learn the pruned layers of a block, and its vectors, from the error of its answer.

    Args:
        runner: Runs the model.
        block: One of its blocks.
        pruned: Layers of it.
        method: What says what their weights are meanwhile.
        options: Options of methods, by id.
        inputs: What the block sees of the calibration text, (windows, ...).
        targets: What it is to answer to it.
        changed: Tensors of the source that the block has become, by name.

    Returns:
        The layers, the vectors by name, and the error on windows kept apart, before and after.
    """
    given = dict(options.get(method.id, {}))
    learning: list[Learnable] = []
    for one in pruned:
        assert one.kept is not None
        learning.append(method.run(weight=one.weight, kept=one.kept, **given))
    schedule = learning[0].schedule
    rate = float(given.get("rate", method.options["rate"].default))
    vectors = {
        name: _Vector(value.clone().requires_grad_(), rate, schedule)
        for name, value in _vectors(runner, block, changed).items()
    }
    layers = [one.layer for one in pruned]
    shapes = [runner.source.tensors[layer.tensor].shape for layer in layers]

    def stored(weights: Sequence[Tensor]) -> dict[str, Tensor]:
        beside = dict(zip(vectors, weights[len(layers) :], strict=True))
        return stored_as(layers, shapes, weights[: len(layers)]) | beside

    answer = runner.block_answer(block, changed)
    problem = BlockError(answer, stored, inputs, targets, schedule.batch)
    error = learn([*learning, *vectors.values()], problem)
    with torch.no_grad():
        done = [
            replace(one, weight=weight, base=weight, notes=(*one.notes, _NOTE))
            for one, weight in zip(pruned, (one.weight() for one in learning), strict=True)
        ]
    return done, {name: one.value.detach() for name, one in vectors.items()}, error


_NOTE = "learned anew in its block: the error is that before"


def _vectors(runner: Runner, block: str, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gains and biases of a block, by name."""
    source = runner.source
    named = (f"{name}{kind}" for name in runner.modules(block) for kind in _VECTORS)
    infos = [source.tensors[name] for name in named if name in source.tensors]
    return {
        info.name: (changed[info.name] if info.name in changed else source.read(info.name)).float()
        for info in infos
        if len(info.shape) == 1 and info.dtype.is_floating_point
    }
