"""Pictures of an inspection: what every measure says of every layer, and how measures agree."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from layerwise.core.telling.inspection import TRUTH, Inspection
from layerwise.report._colours import STEPS
from layerwise.report._svg import drawing, label, tag, wide
from layerwise.report._words import Number, number, plural
from layerwise.report.answers import ranks
from layerwise.report.layer_plots import short
from layerwise.report.plots import alone

_CELL, _TALL = 46.0, 20.0
_APART = 44.0  # between the two pictures
_SLANT = 0.75  # of a slanted name's length goes up


def inspection_svg(inspection: Inspection) -> str:
    """Both pictures, one below the other, as an SVG file of its own.

    Args:
        inspection: What was found out; of one without a figure only the name is drawn.
    """
    columns = inspection.columns
    if not columns:
        words = "Nothing was measured."
        return alone(drawing(360, 40, label(8, 24, words), title=inspection.model, told=words))
    layers, width, height = _layers(columns)
    drawn = [tag("g", *layers)]
    if len(columns) > 1:
        matrix, across, down = _matrix(inspection.agreement)
        drawn.append(tag("g", *matrix, transform=f"translate(0 {height + _APART:.1f})"))
        width, height = max(width, across), height + _APART + down
    truth = "" if inspection.truth is None else f"; {TRUTH}: {inspection.truth.done}"
    told = (
        f"Rank of {plural(max(map(len, columns.values())), 'layer')} under "
        f"{', '.join(columns)}, dark for the most important, and the rank correlation of each "
        f"two{truth}"
    )
    return alone(drawing(width, height, *drawn, title=f"Layers of {inspection.model}", told=told))


def _layers(columns: Mapping[str, Mapping[str, float]]) -> tuple[list[Markup], Number, Number]:
    """A row for each layer, a column for each figure, as dark as the layer ranks high."""
    names = list(max(columns.values(), key=len))
    left, top = _room(short(names), list(columns))
    drawn = [label(left, 14, "rank of each layer, dark: most important", class_="fill-ink")]
    drawn += _heads(list(columns), left, top)
    for down, (name, shown) in enumerate(zip(names, short(names), strict=True)):
        y = top + down * _TALL
        drawn.append(label(left - 8, y + 14, shown, class_="fill-ink", text_anchor="end"))
        for across, (column, values) in enumerate(columns.items()):
            rank = ranks(values).get(name)
            if rank is None:
                continue
            share = 1 - (rank - 1) / max(len(names) - 1, 1)
            colour = f"{'warm' if column == TRUTH else 'cool'}-{round(share * (STEPS - 1))}"
            told = f"{name}: {column} {number(values[name])}, rank {rank:g} of {len(names)}"
            drawn.append(_cell(left + across * _CELL, y, f"{rank:g}", colour, told))
    return drawn, left + _CELL * len(columns) + 8, top + _TALL * len(names)


def _matrix(
    agreement: Mapping[str, Mapping[str, float | None]],
) -> tuple[list[Markup], Number, Number]:
    """The rank correlations: cool where two agree, warm where they are at odds."""
    names = list(agreement)
    left, top = _room(names, names)
    drawn = [label(left, 14, "rank correlation over layers", class_="fill-ink")]
    drawn += _heads(names, left, top)
    for down, name in enumerate(names):
        y = top + down * _TALL
        drawn.append(label(left - 8, y + 14, name, class_="fill-ink", text_anchor="end"))
        for across, other in enumerate(names):
            value = agreement[name][other]
            if value is None:
                continue
            ramp = "cool" if value >= 0 else "warm"
            colour = f"{ramp}-{round(abs(value) * (STEPS - 1))}"
            told = f"{name} and {other}: {value:.3f}"
            drawn.append(_cell(left + across * _CELL, y, f"{value:.2f}", colour, told))
    return drawn, left + _CELL * len(names) + 8, top + _TALL * len(names)


def _room(rows: Sequence[str], heads: Sequence[str]) -> tuple[Number, Number]:
    """What names take at the left and at the top."""
    return max(map(wide, rows)) + 16, 32 + _SLANT * max(map(wide, heads))


def _heads(names: Sequence[str], left: Number, top: Number) -> list[Markup]:
    made: list[Markup] = []
    for place, name in enumerate(names):
        x, y = left + (place + 0.5) * _CELL, top - 6
        made.append(label(x, y, name, transform=f"rotate(-50 {x:.1f} {y:.1f})"))
    return made


def _cell(x: Number, y: Number, words: str, colour: str, told: str) -> Markup:
    size = {"width": _CELL - 1.5, "height": _TALL - 1.5, "rx": 3}
    ground = tag("rect", x=x + 0.75, y=y + 0.75, **size, class_=f"fill-{colour}")
    text = {"class_": f"small fill-on-{colour}", "text_anchor": "middle"}
    return tag("g", tag("title", told), ground, label(x + _CELL / 2, y + 14, words, **text))
