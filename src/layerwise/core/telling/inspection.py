"""What an inspection has to tell: figures of each layer, and how they agree."""

from collections.abc import Mapping
from dataclasses import dataclass, field

# The column of what was measured, beside those of measures.
TRUTH = "truth"

Scores = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Truth:
    """What each layer alone brings to the whole model when something is done to it.

    Attributes:
        kl: KL of the model's answers from the original's, by layer, in nats per predicted token.
        done: What was done to the layer, in words.
        text: Where the windows came from.
        windows: How many were read.
    """

    kl: Mapping[str, float]
    done: str
    text: str
    windows: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found out about the layers of a model.

    Attributes:
        model: The model.
        scores: Of each layer, by measure and then by layer; higher is more important.
        details: All numbers of each layer by measures that say more than one, by `measure.name`.
        about: What measures say of the whole model, by measure and name.
        left_out: Why a measure was left out, by measure, where all were asked for.
        truth: What layers bring alone; None if that was not asked for.
        agreement: Spearman's rank correlation over layers of each two of the measures and the
            truth; None where all layers are alike to one of them.
    """

    model: str
    scores: Scores
    details: Scores = field(default_factory=dict[str, Mapping[str, float]])
    about: Scores = field(default_factory=dict[str, Mapping[str, float]])
    left_out: Mapping[str, str] = field(default_factory=dict[str, str])
    truth: Truth | None = None
    agreement: Mapping[str, Mapping[str, float | None]] = field(
        default_factory=dict[str, Mapping[str, float | None]]
    )

    @property
    def shown(self) -> dict[str, Mapping[str, float]]:
        """All numbers of layers, by name and then by layer: details instead of their score."""
        detailed = {name.partition(".")[0] for name in self.details}
        scores = {name: one for name, one in self.scores.items() if name not in detailed}
        truth = {} if self.truth is None else {TRUTH: self.truth.kl}
        return {**scores, **self.details, **truth}

    @property
    def columns(self) -> dict[str, Mapping[str, float]]:
        """The scores, and after them the truth, by name and then by layer."""
        truth = {} if self.truth is None else {TRUTH: self.truth.kl}
        return {**self.scores, **truth}
