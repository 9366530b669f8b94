"""What a run has to tell: one row per layer and one summary, for tables, pages and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from layerwise.core.plan import LayerPlan
from layerwise.core.reading.checkpoint import TensorInfo
from layerwise.core.reading.structure import Layer
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
    def untouched(cls, layer: Layer, info: TensorInfo, stored: int) -> "LayerRow":
        """The row of a layer that a plan leaves as it is; `stored` is in bytes."""
        plan = LayerPlan(why="the plan leaves it as it is")
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
class Savings:
    """What a model left out while it ran, as counted in that run.

    Operations are those of products of matrices and of attention, 2 for a multiplication and an
    addition; what chooses is not counted where it is no such product.

    Attributes:
        method: What chose.
        density: What it was asked to keep.
        kept: What it kept, of all that it chose among.
        flops_dense: Operations of the dense model on the same.
        flops: Operations that are left.
        sparse_kernel: They are left with a kernel that skips zeros: here they were multiplied.
        cache_dense: Bytes of keys and values at the end of a window, over windows; 0 if no cache
            was thinned.
        cache: Bytes that were held.
        after: So many tokens of each window were the prompt; only what follows was judged.
    """

    method: str
    density: float
    kept: float
    flops_dense: int
    flops: int
    sparse_kernel: bool
    cache_dense: int = 0
    cache: int = 0
    after: int = 0


@dataclass(frozen=True, slots=True)
class TextScore:
    """How likely a text is to be a model's.

    Attributes:
        text: How it begins.
        tokens: Those that were scored.
        label: Its class; "" if that is not known.
        scores: By name; higher is more likely a model's.
    """

    text: str
    tokens: int
    label: str
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Detection:
    """Texts that a model was asked about: which of them did a model write?

    Attributes:
        source: Where they came from.
        texts: One for each.
        machine: The class that was taken for a model's texts; "" if there are not two.
        auroc: Chance that a model's text scores above another, by score.
        short: Texts that were too short to be scored.
    """

    source: str
    texts: Sequence[TextScore]
    machine: str
    auroc: Mapping[str, float]
    short: int


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
        savings: What it left out, where it was to leave work out.
        notes: What else the reader should know.
        detection: What it says of texts that a model may have written.
    """

    model: str
    against: str | None
    text: Comparison | None = None
    noise_floor: Comparison | None = None
    tasks: Sequence[TaskScore] = ()
    images: ImageScores | None = None
    savings: Savings | None = None
    notes: Sequence[str] = ()
    detection: Detection | None = None

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
class Prediction:
    """How well the plan foresaw what its choices would do to the whole model.

    Attributes:
        sensitivity: What weighted the errors of the layers.
        predicted: The KL divergence it foresaw for the whole model, in nats; None if what it went
            by is in another unit.
        measured: The one it has.
        rank_correlation: Spearman's, over layers, of predicted and measured KL divergence; None if
            no layer was measured alone.
        layers: Layers it is over.
    """

    sensitivity: str
    predicted: float | None
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
        forecast: What was foreseen of size, disk, memory and time.
        notes: What else the reader should know.
        prediction: The forecast of quality against what was measured; None if there was none.
        noise_floor: The original against itself in a narrower dtype, on the same text: what is
            below it cannot be told from rounding.
        environment: Versions, machine and date, by name.
        recipe: How the run was asked for.
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
    prediction: Prediction | None = None
    noise_floor: Comparison | None = None
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])
    disk_bytes: int = 0

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


@dataclass(frozen=True, slots=True)
class ByteVote:
    """Language models that read the same bytes, alone and together.

    Attributes:
        models: What each is.
        weights: What each counts, summing to 1.
        text: Where the bytes came from; "" if none were read.
        bytes: How many were foretold.
        bits: Bits per byte of each model; empty without a text.
        bits_together: Of all together.
        bits_error: Standard error of each of `bits`, windows taken as independent draws.
        gained: Bits per byte that all together are below the best of them.
        gained_error: Standard error of `gained`, window by window.
        prompt: What was continued; "" if nothing was.
        continuations: What each model continues it with.
        continuation: What all together do.
    """

    models: Sequence[str]
    weights: Sequence[float]
    text: str = ""
    bytes: int = 0
    bits: Sequence[float] = ()
    bits_together: float | None = None
    bits_error: Sequence[float | None] = ()
    gained: float | None = None
    gained_error: float | None = None
    prompt: str = ""
    continuations: Sequence[str] = ()
    continuation: str = ""

    def as_json(self) -> dict[str, Any]:
        """The fields by name, all the way down."""
        return asdict(self)
