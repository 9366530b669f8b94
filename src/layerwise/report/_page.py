"""What a page is made of: figures, tables, bars and pictures, in the order it shows them."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from layerwise.report._words import Number
from layerwise.report.layer_plots import Panel


@dataclass(frozen=True, slots=True)
class Card:
    """One figure of the summary.

    Attributes:
        title: What it is.
        value: The figure.
        notes: Lines below it.
        good: Marked as held.
        share: Filled part of a bar, in per cent.
        picture: Below the lines.
    """

    title: str
    value: str
    notes: Sequence[str] = ()
    good: bool = False
    share: Number | None = None
    picture: Markup | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: its head, what the head means, and how its cells are set."""

    name: str
    hint: str = ""
    kind: str = "number"


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell: its text, and the value it is sorted by."""

    text: str
    value: Number | str | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A table; `sorts` lets the reader sort and filter it."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    sorts: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """The bytes of a layer, as shares of the largest one's, in per cent."""

    name: str
    before: Number
    after: Number
    colour: str
    sizes: str
    got: str


@dataclass(frozen=True, slots=True)
class Block:
    """The bars of one block."""

    name: str
    total: str
    bars: Sequence[Bar]


@dataclass(frozen=True, slots=True)
class Page:
    """What a page says, in its order; what is empty is left out."""

    title: str
    model: str
    kind: str
    lede: str
    cards: Sequence[Card]
    notes: Sequence[str]
    environment: Sequence[tuple[str, str]]
    recipe: str
    pareto: Sequence[tuple[str, Markup]] = ()
    points: Table | None = None
    overview: Markup | None = None
    blocks: Sequence[Block] = ()
    folded: bool = False
    key: Sequence[tuple[str, str]] = ()
    curves: Sequence[Panel] = ()
    maps: Sequence[tuple[str, Markup]] = ()
    forecast: Table | None = None
    scatter: Markup | None = None
    scatter_note: str = ""
    decisions: Table | None = None
    left: Table | None = None

    @property
    def sections(self) -> list[tuple[str, str]]:
        """The anchor and the title of each section that has something to say."""
        all_of_them = (
            ("sweep", "Size against quality", self.pareto or self.points),
            ("layers", "Where the bytes went", self.blocks),
            ("map", "Blocks and roles", self.maps),
            ("curves", "What each layer could have cost", self.curves),
            ("forecast", "Foreseen and measured", self.forecast),
            ("decisions", "Every decision", self.decisions),
            ("left", "Left alone", self.left),
            ("made", "How it was made", self.environment or self.recipe),
        )
        return [(anchor, title) for anchor, title, content in all_of_them if content]
