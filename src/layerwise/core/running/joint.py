"""The layers of a block whose codes are learned together."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.keeping.candidates import Options
from layerwise.core.learning import BlockAnswer, BlockError, Learned, learn
from layerwise.core.plan import LayerPlan
from layerwise.core.reading.structure import Layer
from layerwise.core.results import Coded
from layerwise.core.running.evidence import of_layer
from layerwise.core.running.products import Answered
from layerwise.core.running.runner import Runner


def learned_together(
    runner: Runner,
    block: str,
    layers: Sequence[Layer],
    weights: Sequence[Float[Tensor, "_ _"]],
    evidence: Sequence[Mapping[str, Any]],
    plans: Sequence[LayerPlan],
    options: Options,
    *,
    inputs: Tensor,
    targets: Tensor,
    changed: Mapping[str, Tensor],
) -> dict[str, Coded]:
    """Learn codes from the error of a block's answer; those of one method at a time.

    Args:
        runner: Runs the model.
        block: One of its blocks.
        layers: Layers of it; none is an expert.
        weights: Their weights, float32.
        evidence: What calibration saw of the input of each.
        plans: Their plans, all of methods that learn.
        options: Options of methods, by id.
        inputs: What the block sees of the calibration text, (windows, ...).
        targets: What it is to answer to it.
        changed: Tensors of the source that other layers of the block have become, by name.

    Returns:
        The codes, by layer.
    """
    coded: dict[str, Coded] = {}
    changed = dict(changed)
    by_method: dict[str, list[int]] = {}
    for number, plan in enumerate(plans):
        by_method.setdefault(plan.method, []).append(number)
    for numbers in by_method.values():
        chosen = [layers[n] for n in numbers]
        learning = [
            _learning(layers[n], weights[n], evidence[n], plans[n], options) for n in numbers
        ]
        _share(chosen, learning)
        shapes = [runner.source.tensors[layer.tensor].shape for layer in chosen]
        problem = BlockError(
            _answered(runner.block_answer(block, changed), chosen, learning),
            functools.partial(stored_as, chosen, shapes),
            inputs,
            targets,
            learning[0].schedule.batch,
        )
        learn(learning, problem)
        for layer, learned, shape in zip(chosen, learning, shapes, strict=True):
            coded[layer.name] = learned.coded()
            with torch.no_grad():
                changed[layer.tensor] = layer.store(learned.weight(), shape)
    return coded


def stored_as(
    layers: Sequence[Layer], shapes: Sequence[tuple[int, ...]], weights: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The weights of some layers as the source holds them, by the tensor's name."""
    return {
        layer.tensor: layer.store(weight, shape)
        for layer, weight, shape in zip(layers, weights, shapes, strict=True)
    }


def _share(layers: Sequence[Layer], learning: Sequence[Learned]) -> None:
    """Let those that read one input know of each other."""
    together: dict[str, list[Learned]] = {}
    for layer, learned in zip(layers, learning, strict=True):
        together.setdefault(layer.reads, []).append(learned)
    for first, *others in together.values():
        first.share(others)


def _answered(
    answer: BlockAnswer, layers: Sequence[Layer], learning: Sequence[Learned]
) -> BlockAnswer:
    """A block's answer where layers that are learned answer in their own way."""

    def made(hidden: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        answers = {
            tensors[layer.tensor].data_ptr(): own
            for layer, learned in zip(layers, learning, strict=True)
            if (own := learned.answering()) is not None
        }
        if not answers:
            return answer(hidden, tensors)
        with Answered(answers):
            return answer(hidden, tensors)

    return made


def _learning(
    layer: Layer,
    weight: Tensor,
    evidence: Mapping[str, Any],
    plan: LayerPlan,
    options: Options,
) -> Learned:
    method = plan.quantizer
    assert method.learns is not None
    grid = {"bits": plan.bits, "group": plan.group or layer.width, "symmetric": plan.symmetric}
    own = of_layer(evidence, layer.name)
    seen = {word: own[word] for word in method.evidence if word != "weight"}
    return method.learns(weight=weight, **seen, **dict(options.get(method.id, {})) | grid)
