"""What a merge has to tell: one row per tensor, and how good each model is."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from layerwise.core.written import rebuilt


@dataclass(frozen=True, slots=True)
class MergedRow:
    """What became of one tensor.

    Attributes:
        tensor: Its name.
        shape: Its shape.
        block: The block it belongs to, "" outside all of them.
        method: What merged it, in a word.
        shares: How much each model counted, in the order they were given.
        options: Options of the method that were set.
        distances: Its relative distance to each model's, |W - W_k| / |W_k|, in the order they were
            given; None for a model that lacks it.
        from_base: Its relative distance to the base's; None without a base.
        note: What else the reader should know.
    """

    tensor: str
    shape: Sequence[int]
    block: str
    method: str
    shares: Sequence[float]
    options: Mapping[str, Any]
    distances: Sequence[float | None]
    from_base: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """How good one model is on one text.

    Attributes:
        model: Its label.
        text: The text's label.
        loss: Mean cross-entropy, in nats per predicted token.
        tokens: How many were predicted.
    """

    model: str
    text: str
    loss: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Barrier:
    """How much worse it is between two models than the two are.

    Attributes:
        first: One model.
        second: Another one.
        text: The text's label.
        height: Most that a point W(t) = (1 - t) A + t B loses beyond (1 - t) L(A) + t L(B), in
            nats per token; 0 or less where the way is downhill.
        at: The t of that point.
        losses: At every point looked at, those of the two included.
    """

    first: str
    second: str
    text: str
    height: float
    at: float
    losses: Sequence[float]


@dataclass(frozen=True, slots=True)
class Fit:
    """What was found by trying.

    Attributes:
        text: What the coefficients were found on.
        evaluations: Models that were tried.
        uniform: The best weights that are the same everywhere, in the order the models were given.
        uniform_loss: Their loss on that text, nats per token.
        loss: That of the coefficients for each group of layers.
        unseen_uniform_loss: The first on the part of the text that was kept aside.
        unseen_loss: The second there.
        groups: The coefficients of each group of tensors.
    """

    text: str
    evaluations: int
    uniform: Sequence[float]
    uniform_loss: float
    loss: float
    unseen_uniform_loss: float
    unseen_loss: float
    groups: Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Merge:
    """What a merge has to tell.

    Attributes:
        models: Labels of the models, as given.
        base: Label of their base; "" without one.
        out: Where the result is.
        method: What merged them.
        dtype: In what floats are stored.
        rows: One for each tensor.
        scores: Every model and the result on every text.
        barriers: Between every two models on every text.
        fit: What was found by trying, if anything was.
        bytes: Weight files of the result.
        seconds: Wall time.
        cpu_seconds: Processor time.
        peak_bytes: Most memory held at once.
        notes: What else the reader should know.
        environment: Versions, machine and date, by name.
        recipe: How the merge was asked for.
    """

    models: Sequence[str]
    base: str
    out: str
    method: str
    dtype: str
    rows: Sequence[MergedRow]
    bytes: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    scores: Sequence[Score] = ()
    barriers: Sequence[Barrier] = ()
    fit: Fit | None = None
    notes: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def as_json(self) -> dict[str, Any]:
        """The fields by name, all the way down."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str = "the report") -> "Merge":
        """A report from its fields by name.

        Raises:
            UserError: It is no such report.
        """
        return rebuilt(cls, content, where)
