"""What a run has to tell: one row per layer and one summary, for tables, pages and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from layerwise.core.checkpoint import TensorInfo
from layerwise.core.plan import LayerPlan
from layerwise.core.structure import Layer
from layerwise.core.written import rebuilt


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a layer could have got.

    Attributes:
        label: In words.
        bits: Width of a code; None if it would keep its dtype.
        density: Fraction of weights that would be kept.
        rank: Columns of the low-rank correction.
        bytes: Everything that would be stored.
        error: What it was foreseen to cost, in the unit the plan was made in.
        chosen: The plan took this one.
    """

    label: str
    bits: int | None
    density: float
    rank: int
    bytes: int
    error: float
    chosen: bool


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
        block: The block it belongs to, "" outside all of them.
        role: Its job in the block.
        curve: What it could have got; empty if the plan's maker did not look.
        predicted_kl: The KL divergence that it was foreseen to bring, in nats.
        measured_kl: The one that it brings alone, in nats.
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
    block: str = ""
    role: str = ""
    curve: Sequence[Candidate] = ()
    predicted_kl: float | None = None
    measured_kl: float | None = None

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
            block=layer.block,
            role=layer.role,
        )

    @classmethod
    def untouched(cls, layer: Layer, info: TensorInfo) -> "LayerRow":
        """The row of a layer that a plan leaves as it is."""
        plan = LayerPlan(why="the plan leaves it as it is")
        stored = layer.count * info.dtype.itemsize
        return cls.of(layer, plan, info, stored=stored, error=0.0, density=1.0, notes=())

    def as_json(self) -> dict[str, Any]:
        """The fields by name, all the way down."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "LayerRow":
        """A row from its fields by name."""
        return rebuilt(cls, content, "a layer's row")


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
class Prediction:
    """How well the plan foresaw what its choices would do to the whole model.

    Attributes:
        sensitivity: What weighted the errors of the layers.
        predicted: The KL divergence it foresaw for the whole model, in nats.
        measured: The one it has.
        rank_correlation: Spearman's, over layers, of predicted and measured KL divergence; None if
            no layer was measured alone.
        layers: Layers it is over.
    """

    sensitivity: str
    predicted: float
    measured: float
    rank_correlation: float | None
    layers: int


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
        notes: What else the reader should know.
        prediction: The forecast of quality against what was measured; None if there was none.
        noise_floor: The original against itself in a narrower dtype, on the same text: what is
            below it cannot be told from rounding.
        environment: Versions, machine and date, by name.
        recipe: How the run was asked for.
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
    prediction: Prediction | None = None
    noise_floor: Comparison | None = None
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def as_json(self) -> dict[str, Any]:
        """The fields by name, all the way down."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str = "the report") -> "Report":
        """A report from its fields by name; what an older one lacks has its default.

        Args:
            content: What `as_json` gave, as JSON keeps it.
            where: Where it stands, for the message.

        Raises:
            UserError: It is no such report.
        """
        return rebuilt(cls, content, where)


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One model of a sweep.

    Attributes:
        method: What made it.
        budget: The size that was asked for, as given.
        bits: Stored bits per planned weight.
        bytes: Its weight files.
        kl: Mean KL divergence from the original, in nats; None if it was not compared.
        perplexity: On the sweep's text; None if it was not compared.
        top1: Share of tokens whose likeliest successor is the original's.
        seconds: Wall time.
        front: No other point is both as small and as good.
        out: Where it is; "" if it was not kept.
        uniform: Every layer got the same.
    """

    method: str
    budget: str
    bits: float
    bytes: int
    kl: float | None
    perplexity: float | None
    top1: float | None
    seconds: float
    front: bool
    out: str
    uniform: bool = False


@dataclass(frozen=True, slots=True)
class Sweep:
    """Methods and budgets tried on one model.

    Attributes:
        model: What was compressed.
        text: Where the windows it was compared on came from; "" if it was not.
        points: One for each method and budget.
        original: The original on that text.
        noise_floor: The original against itself in a narrower dtype, on that text.
        format: How the points are stored.
        bytes_before: Weight files of the original.
        seconds: Wall time.
        notes: What else the reader should know.
        environment: Versions, machine and date, by name.
        recipe: How the sweep was asked for.
    """

    model: str
    text: str
    points: Sequence[SweepPoint]
    original: Comparison | None = None
    noise_floor: Comparison | None = None
    format: str = ""
    bytes_before: int = 0
    seconds: float = 0.0
    notes: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def as_json(self) -> dict[str, Any]:
        """The fields by name, all the way down."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str = "the sweep") -> "Sweep":
        """A sweep from its fields by name; what an older one lacks has its default.

        Args:
            content: What `as_json` gave, as JSON keeps it.
            where: Where it stands, for the message.

        Raises:
            UserError: It is no such sweep.
        """
        return rebuilt(cls, content, where)
