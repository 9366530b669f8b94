"""What a run has to tell: one row per layer and one summary, as tables and JSON show them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from layerwise.core.checkpoint import TensorInfo
from layerwise.core.plan import LayerPlan
from layerwise.core.structure import Layer


@dataclass(frozen=True, slots=True)
class LayerRow:
    """What became of one layer.

    Attributes:
        layer: Its name.
        rows: Outputs.
        width: Inputs.
        bytes_before: Its size in the checkpoint.
        bytes_after: Everything stored for it: codes, scales, zero points, masks, corrections.  In
            a dense file that is what they would take.
        bits: Width of a code; None if it keeps its dtype.
        stored_bits: Bits per weight, everything counted.
        method: What was done, in words.
        density: Fraction of weights that were kept.
        rank: Columns of its low-rank correction.
        error: Relative error of its output on the calibration text; of its weight without one.
        score: How sensitive it is, as the plan's maker saw it; None if it did not look.
        why: Why it got this.
        notes: What the methods had to do that the reader should know.
    """

    layer: str
    rows: int
    width: int
    bytes_before: int
    bytes_after: int
    bits: int | None
    stored_bits: float
    method: str
    density: float
    rank: int
    error: float
    score: float | None
    why: str
    notes: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        layer: Layer,
        plan: LayerPlan,
        info: TensorInfo,
        *,
        stored: int,
        error: float,
        density: float,
        notes: Sequence[str],
    ) -> "LayerRow":
        """The row of a layer that a plan was carried out on; `stored` is in bytes."""
        return cls(
            layer=layer.name,
            rows=layer.rows,
            width=layer.width,
            bytes_before=layer.count * info.dtype.itemsize,
            bytes_after=stored,
            bits=plan.bits,
            stored_bits=8 * stored / layer.count,
            method=" + ".join(id.partition("/")[2] for id, _ in plan.steps) or "none",
            density=density,
            rank=plan.rank,
            error=error,
            score=plan.score,
            why=plan.why,
            notes=tuple(notes),
        )

    @classmethod
    def untouched(cls, layer: Layer, info: TensorInfo) -> "LayerRow":
        """The row of a layer that a plan leaves as it is."""
        plan = LayerPlan(why="the plan leaves it as it is")
        stored = layer.count * info.dtype.itemsize
        return cls.of(layer, plan, info, stored=stored, error=0.0, density=1.0, notes=())

    def as_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model against the one it was made from, on the same windows of text.

    Attributes:
        tokens: Predicted tokens.
        perplexity: exp of the mean cross-entropy in nats.
        kl: Mean KL divergence of the next-token distributions, original to result, in nats.
        top1: Share of tokens whose likeliest successor is the same.
        text: Where the windows came from.
        perplexity_before: The original's perplexity.
    """

    tokens: int
    perplexity: float
    perplexity_before: float | None
    kl: float | None
    top1: float | None
    text: str


@dataclass(frozen=True, slots=True)
class Proof:
    """The written files, loaded back, against what was in memory when they were written.

    Attributes:
        loader: What loaded them.
        largest_difference: Largest absolute difference of a logit.
        allowed: Largest difference that counts as the same.
        tokens: Tokens compared.
    """

    loader: str
    largest_difference: float
    allowed: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Report:
    """Everything a compression has to tell.

    Attributes:
        model: What was compressed.
        out: Where the result is.
        format: How it is stored.
        layers: One row each.
        left: Tensors left alone, with the reason.
        bytes_before: Weight files of the original.
        bytes_after: Weight files of the result.
        average_bits: Stored bits per weight, over the planned layers.
        comparison: Quality on held-out text; None if the model was not run.
        proof: The reload; None if the model was not run.
        seconds: Wall time.
        work_seconds: The part of it that the forecast is of: all after the plan was made.
        cpu_seconds: Processor time.
        peak_bytes: Most memory held at once.
        forecast: What was foreseen of size, disk, memory and time.
        notes: What else the reader should know.
        disk_bytes: Most room taken on the output's disk at once.
    """

    model: str
    out: str
    format: str
    layers: Sequence[LayerRow]
    left: Mapping[str, str]
    bytes_before: int
    bytes_after: int
    average_bits: float
    comparison: Comparison | None
    proof: Proof | None
    seconds: float
    work_seconds: float
    cpu_seconds: float
    peak_bytes: int
    forecast: Mapping[str, int | float]
    notes: Sequence[str] = field(default_factory=tuple[str, ...])
    disk_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """The fields by name, all the way down."""
        return asdict(self)
