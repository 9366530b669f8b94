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

    An `…_error` is a standard error over windows, analytic: the deviation of the windows' means by
    the root of their number; for a perplexity, carried through exp.  None for a single window.

    Attributes:
        tokens: Predicted tokens.
        perplexity: exp of the mean cross-entropy in nats.
        kl: Mean KL divergence of the next-token distributions, original to result, in nats.
        top1: Share of tokens whose likeliest successor is the same.
        text: Where the windows came from.
        perplexity_before: The original's perplexity.
        windows: How many were read.
        length: Tokens of each; the first one is not predicted.
        digest: SHA-256 of their token ids.
        special: Which tokens stand in them beside those of the text.
        perplexity_error: Standard error of `perplexity`.
        perplexity_before_error: Of `perplexity_before`.
        loss_added: Mean cross-entropy, result less original, in nats: each window against itself.
        loss_added_error: Standard error of `loss_added`.
        kl_error: Of `kl`.
        top1_error: Of `top1`.
    """

    tokens: int
    perplexity: float
    perplexity_before: float | None
    kl: float | None
    top1: float | None
    text: str
    windows: int = 0
    length: int = 0
    digest: str = ""
    special: str = ""
    perplexity_error: float | None = None
    perplexity_before_error: float | None = None
    loss_added: float | None = None
    loss_added_error: float | None = None
    kl_error: float | None = None
    top1_error: float | None = None


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: Its name, or that of a group of tasks.
        metric: Which metric, with the filter of the answers where there is one.
        value: The model's.
        error: Its standard error, as the harness gives it; None if it does not.
        items: How many were answered.
        fewshot: Solved examples before each.
        version: The task's, as its author counts.
        cached: The answer of an earlier run with these very weights.
        higher_is_better: What it says; None if the task does not say.
        before: The original's value.
        before_error: Its standard error.
        difference: `value` less `before`.
        difference_error: Its standard error: over the items, each against itself, where every item
            has a value; of two independent runs where it has not.
        paired: Which of the two it is.
    """

    task: str
    metric: str
    value: float
    error: float | None
    items: int
    fewshot: int | None
    version: str
    cached: bool
    higher_is_better: bool | None
    before: float | None = None
    before_error: float | None = None
    difference: float | None = None
    difference_error: float | None = None
    paired: bool = False


@dataclass(frozen=True, slots=True)
class ImageScores:
    """An image classifier, alone or against the one it was made from.

    An `…_error` is a standard error over pictures: their deviation by the root of their number.

    Attributes:
        images: How many.
        classes: How many the model tells apart.
        source: Where the pictures came from.
        digest: SHA-256 of pictures and labels.
        normalised: How their values were made.
        accuracy: Share whose likeliest class is theirs.
        top5: Share whose class is among the five likeliest; None with five classes or fewer.
        accuracy_before: The original's accuracy.
        top5_before: The original's.
        agreement: Share with the same likeliest class.
        kl: Mean KL divergence of the classes, original to result, in nats.
        gained: Accuracy, result less original.
        accuracy_error: Standard error of `accuracy`.
        top5_error: Of `top5`.
        accuracy_before_error: Of `accuracy_before`.
        top5_before_error: Of `top5_before`.
        agreement_error: Of `agreement`.
        kl_error: Of `kl`.
        gained_error: Of `gained`, each picture against itself.
    """

    images: int
    classes: int
    source: str
    digest: str
    normalised: str
    accuracy: float
    top5: float | None
    accuracy_before: float | None
    top5_before: float | None
    agreement: float | None
    kl: float | None
    gained: float | None
    accuracy_error: float | None
    top5_error: float | None
    accuracy_before_error: float | None
    top5_before_error: float | None
    agreement_error: float | None
    kl_error: float | None
    gained_error: float | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything `evaluate` has to tell; what was not asked for is None, or empty.

    Attributes:
        model: What was judged.
        against: What it was compared with.
        text: On text.
        noise_floor: The original computed in bfloat16 against itself, on the same windows.
        tasks: On tasks.
        images: On images.
    """

    model: str
    against: str | None
    text: Comparison | None = None
    noise_floor: Comparison | None = None
    tasks: Sequence[TaskScore] = ()
    images: ImageScores | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields by name, all the way down."""
        return asdict(self)


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
        forecast: What was foreseen of size, memory and time.
        noise_floor: The original computed in bfloat16 against itself; None if it was not.
        notes: What else the reader should know.
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
    noise_floor: Comparison | None = None
    notes: Sequence[str] = field(default_factory=tuple[str, ...])

    def as_json(self) -> dict[str, Any]:
        """The fields by name, all the way down."""
        return asdict(self)
