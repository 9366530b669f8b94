"""What a run will take, said before it starts: bytes, memory, time."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch

from layerwise.core import catalogue, memory
from layerwise.core.apply import transform
from layerwise.core.checkpoint import Source
from layerwise.core.economy import MICRO_BATCH_TOKENS
from layerwise.core.families import WIDTHS, configured
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.stream import SLICE_ENTRIES
from layerwise.core.structure import Layer, Structure

_SAMPLE_ROWS = 256
_SIDE = 1024
_FLOAT = 4  # bytes


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is foreseen.

    Attributes:
        size_bytes: Weight files of the output, exact.
        peak_bytes: Most memory held at once.
        seconds: Wall time from here.
    """

    size_bytes: int
    peak_bytes: int
    seconds: float

    def as_json(self) -> Mapping[str, int | float]:
        """The fields by name."""
        return asdict(self)


def forecast(
    source: Source, found: Structure, plan: Plan, size: int, *, runs: bool, tokens: int, proof: int
) -> Forecast:
    """Foresee a run of a plan.

    Time is a sample scaled up: each method on few and on more rows of a layer as wide as those it
    gets, and one matrix product for the model's forward passes.

    Args:
        source: The model.
        found: Its structure.
        plan: What will be done.
        size: Bytes of the output.
        runs: The model is run block by block; otherwise tensors are streamed.
        tokens: Tokens carried through the model, each text counted.
        proof: Tokens whose logits are compared after the files are loaded back.
    """
    seconds = _transform_seconds(found, plan)
    if not runs:
        largest = max(info.size for info in source.tensors.values())
        peak = memory.peak_bytes() + 2 * largest + 16 * SLICE_ENTRIES * _FLOAT
        return Forecast(size, peak, seconds + (size + _bytes(source)) / 1e9)
    weights = sum(info.count for info in source.tensors.values())
    rate = _products_per_second(max(found.layers.values(), key=lambda layer: layer.count))
    seconds += 2 * weights * (2 * tokens + proof) / rate
    hidden = configured(source.config, WIDTHS)
    vocabulary = int(source.config.get("vocab_size") or 0)
    block = max(
        sum(layer.count for layer in found.layers.values() if layer.block == name)
        for name in found.blocks
    )
    inputs = {(layer.block, layer.reads): layer.width for layer in found.layers.values()}
    grams = max(
        sum(width**2 for (name, _), width in inputs.items() if name == one) for one in found.blocks
    )
    # What the layers of a block answer to one batch lives until the block has answered.
    answered = max(
        sum(layer.rows for layer in found.layers.values() if layer.block == name)
        for name in found.blocks
    )
    activations = 2 * tokens * hidden + min(tokens, MICRO_BATCH_TOKENS) * answered
    working = 3 * block + grams + activations
    proving = weights + 4 * min(proof, 8192) * vocabulary if proof else 0
    peak = memory.peak_bytes() + _FLOAT * max(working, proving)
    return Forecast(size, peak, seconds)


def _bytes(source: Source) -> int:
    return sum(info.size for info in source.tensors.values())


def _transform_seconds(found: Structure, plan: Plan) -> float:
    """Seconds of all methods: what a width takes whatever the rows, and what each row adds.

    Layers that read one input and are treated alike are stacked: what the width takes counts once.
    """
    sampled: dict[tuple[LayerPlan, int], tuple[float, float]] = {}
    stacked: set[tuple[str, LayerPlan]] = set()
    total = 0.0
    for name, layer_plan in plan.layers.items():
        layer = found.layers[name]
        # Which density it is moves no time, and each of a thousand would be sampled for itself.
        work = replace(layer_plan.work, density=0.5 if layer_plan.density < 1 else 1.0)
        if (work, layer.width) not in sampled:
            sampled[work, layer.width] = _sample(layer, work, plan)
        fixed, each = sampled[work, layer.width]
        total += each * layer.rows + (0.0 if (layer.reads, work) in stacked else fixed)
        if all(catalogue.get(id).rows != "layer" for id, _ in work.steps):
            stacked.add((layer.reads, work))
    return total


def _sample(layer: Layer, work: LayerPlan, plan: Plan) -> tuple[float, float]:
    """Seconds that a width takes, and seconds that each row adds."""
    if not work.steps:
        return 0.0, 0.0
    most = min(layer.rows, _SAMPLE_ROWS)
    few = max(1, most // 4)
    _timed(layer, work, plan, few)  # the first time, everything is slower
    least, longest = _timed(layer, work, plan, few), _timed(layer, work, plan, most)
    each = max(0.0, longest - least) / max(1, most - few)
    return max(0.0, least - each * few), each


def _timed(layer: Layer, work: LayerPlan, plan: Plan, rows: int) -> float:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, layer.width, generator=generator)
    words = {word for id, _ in work.steps for word in catalogue.get(id).evidence}
    evidence = {
        "gram": torch.eye(layer.width),
        "magnitude": torch.ones(layer.width),
        "inputs": torch.ones(1, layer.width),
    }
    given = {word: value for word, value in evidence.items() if word in words}
    smaller = replace(layer, rows=rows)
    plans = [replace(work, rank=min(work.rank, rows))]
    begun = time.perf_counter()
    transform([smaller], [weight], given, plans, plan.options)
    return time.perf_counter() - begun


def _products_per_second(layer: Layer) -> float:
    """Multiplications and additions per second of a matrix product of a layer's shape."""
    rows, width = min(layer.rows, _SIDE), min(layer.width, _SIDE)
    inputs, weight = torch.ones(_SIDE, width), torch.ones(width, rows)
    torch.mm(inputs, weight)
    begun = time.perf_counter()
    for _ in range(4):
        torch.mm(inputs, weight)
    return 4 * 2 * _SIDE * width * rows / (time.perf_counter() - begun)
