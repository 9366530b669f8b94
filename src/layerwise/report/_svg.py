"""The parts of a drawing: elements, axes with their ticks, legends, labels that keep clear."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from layerwise.report._colours import SERIES
from layerwise.report._words import Number

_LINE = 18  # pixels from one line of text to the next
Box = tuple[Number, Number, Number, Number]  # left, top, right, bottom


def tag(name: str, *inside: str, **attributes: str | Number | None) -> Markup:
    """An element; text and values are escaped, what is Markup stands as it is.

    Args:
        name: Of the element.
        inside: Elements and text.
        attributes: By name, `class_` for class, `_` for `-`; those that are None are left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    body = "".join(escape(part) for part in inside)
    return Markup(f"<{name}{written}>{body}</{name}>")


def _plain(value: str | Number) -> str:
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")


def label(x: Number, y: Number, words: str, **attributes: str | Number | None) -> Markup:
    """A line of text; muted unless a class is given."""
    return tag("text", words, x=x, y=y, **{"class_": "fill-muted", **attributes})


def line(
    x1: Number, y1: Number, x2: Number, y2: Number, **attributes: str | Number | None
) -> Markup:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, **attributes)


def path(points: Iterable[tuple[Number, Number]], **attributes: str | Number | None) -> Markup:
    """A line through points."""
    drawn = "L".join(f"{_plain(x)} {_plain(y)}" for x, y in points)
    return tag("path", d=f"M{drawn}", fill="none", **attributes)


def dots(points: Iterable[tuple[Number, Number]], radius: Number, **attributes: str) -> Markup:
    """Many dots in one element, of the class's stroke."""
    drawn = "".join(f"M{_plain(x)} {_plain(y)}h0" for x, y in points)
    width = 2 * radius
    return tag(
        "path", d=drawn, fill="none", stroke_linecap="round", stroke_width=width, **attributes
    )


def marker(
    shape: int,
    x: Number,
    y: Number,
    radius: Number,
    *inside: str,
    **attributes: str | Number | None,
) -> Markup:
    """One of four shapes around a point, so that colour is not all that tells series apart."""
    if shape % 4 == 0:
        return tag("circle", *inside, cx=x, cy=y, r=radius, **attributes)
    corners = {
        1: ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        2: ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
        3: ((0, -1.2), (1.15, 0.85), (-1.15, 0.85)),
    }[shape % 4]
    drawn = " ".join(f"{_plain(x + dx * radius)},{_plain(y + dy * radius)}" for dx, dy in corners)
    return tag("polygon", *inside, points=drawn, **attributes)


def drawing(
    width: Number, height: Number, *inside: str, title: str, told: str, sized: bool = False
) -> Markup:
    """A picture with a title, and its content told in words for those who do not see it.

    Args:
        width: Of what it is drawn on.
        height: Of what it is drawn on.
        inside: Elements.
        title: What it is a picture of.
        told: What it shows.
        sized: It keeps its size; otherwise it fills the width there is.
    """
    return tag(
        "svg",
        tag("title", title),
        tag("desc", told),
        *inside,
        viewBox=f"0 0 {_plain(width)} {_plain(height)}",
        role="img",
        aria_label=f"{title}. {told}",
        width=width if sized else None,
        height=height if sized else None,
    )


# Axes


@dataclass(frozen=True, slots=True)
class Axis:
    """Where values lie between two places of a drawing.

    Attributes:
        low: Value at `start`.
        high: Value at `end`.
        start: Place of the lowest value.
        end: Place of the highest value.
        log: Equal ratios are equally far apart; what is not above zero lies at `start`.
        zero: A logarithmic axis whose values have zeros among them.
    """

    low: Number
    high: Number
    start: Number
    end: Number
    log: bool
    zero: bool = False

    def at(self, value: Number) -> Number:
        """The place of a value, inside the axis."""
        if self.log:
            low = math.log10(self.low)
            share = (math.log10(max(value, self.low)) - low) / (math.log10(self.high) - low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[Number]:
        """Round values to label, about `count` of them."""
        if self.log and self.high >= 10 * self.low:
            return [0.0] * self.zero + self._decades(count)
        rough = (self.high - self.low) / count
        power = 10 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [float(f"{n * step:.12g}") for n in range(first, last + 1)]

    def _decades(self, count: int) -> list[Number]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for parts in ((1, 2, 5), (1, 3), (1,)):
            made = [float(f"{part}e{power}") for power in powers for part in parts]
            inside = [tick for tick in made if self.low <= tick <= self.high]
            if len(inside) <= count + 1:
                return inside
        return inside[:: math.ceil(len(inside) / (count + 1))]


def axis(
    values: Iterable[Number],
    start: Number,
    end: Number,
    *,
    log: bool | None = None,
    room: Number = 0.06,
) -> Axis:
    """An axis that holds some values, with some room at its ends.

    Args:
        values: At least one.
        start: Place of the lowest value.
        end: Place of the highest value.
        log: Whether it is logarithmic; None where nothing is below zero and the largest is 20
            times the smallest above it, or more.
        room: Share of the axis to leave at each end.
    """
    held = sorted(values)
    positive = [value for value in held if value > 0]
    if log is None:
        log = bool(positive) and held[0] >= 0 and held[-1] >= 20 * positive[0]
    if log and positive:
        low, high = math.log10(positive[0]), math.log10(positive[-1])
        apart = max(high - low, 0.3)
        more = 0.15 if high - low < 0.3 else room * apart
        # What is zero lies by itself, below the smallest that is not.
        zero = positive != held
        low, high = low - more - 0.1 * apart * zero, high + more
        limits = (10.0 ** max(low, -300), 10.0 ** min(high, 300))
        return Axis(*limits, start, end, True, zero)
    low, high = held[0], held[-1]
    span = (high - low) or abs(high) or 1.0
    below = low - room * span
    return Axis(max(below, 0.0) if low >= 0 else below, high + room * span, start, end, False)


# Labels that keep clear of each other


def wide(words: str, points: Number = 12) -> Number:
    """About how wide a line of text is."""
    return 0.57 * points * len(words)


def meet(first: Box, second: Box) -> bool:
    """Whether two boxes overlap."""
    apart = first[2] <= second[0] or second[2] <= first[0]
    return not (apart or first[3] <= second[1] or second[3] <= first[1])


def inside(inner: Box, outer: Box) -> bool:
    """Whether a box lies in another."""
    return (
        inner[0] >= outer[0]
        and inner[1] >= outer[1]
        and inner[2] <= outer[2]
        and inner[3] <= outer[3]
    )


def wrapped(widths: Sequence[Number], room: Number) -> list[tuple[Number, int]]:
    """Where things of some widths stand, (x, row), when they are set in rows."""
    places: list[tuple[Number, int]] = []
    x, row = 0.0, 0
    for width in widths:
        if x and x + width > room:
            x, row = 0.0, row + 1
        places.append((x, row))
        x += width
    return places


def lower_hull(points: Iterable[tuple[Number, Number]]) -> list[tuple[Number, Number]]:
    """Those of some (cost, error) that no cheaper one is as good as, cheapest first."""
    kept: list[tuple[Number, Number]] = []
    for cost, error in sorted(points):
        if not kept or error < kept[-1][1]:
            kept.append((cost, error))
    return kept


# Parts that several pictures have


def frame(
    x: Axis,
    y: Axis,
    across: Callable[[Number], str],
    up: Callable[[Number], str],
    count: int = 4,
) -> list[Markup]:
    """Grid lines and the values at them."""
    drawn = [level(y, tick, x.start, x.end, up(tick)) for tick in y.ticks(5)]
    for tick in x.ticks(count):
        place = x.at(tick)
        drawn.append(line(place, y.start, place, y.end, class_="stroke-grid"))
        drawn.append(label(place, y.start + 17, across(tick), text_anchor="middle"))
    drawn.append(line(x.start, y.start, x.end, y.start, class_="stroke-kept"))
    return drawn


def level(y: Axis, tick: Number, left: Number, right: Number, words: str) -> Markup:
    place = y.at(tick)
    rule = line(left, place, right, place, class_="stroke-grid")
    return tag("g", rule, label(left - 8, place + 4, words, text_anchor="end"))


def upright(x: Number, y: Number, words: str) -> Markup:
    turned = f"rotate(-90 {x:.1f} {y:.1f})"
    return label(x, y, words, text_anchor="middle", transform=turned)


def swatch(place: int) -> Markup:
    look = f"fill-series-{place % SERIES}"
    return tag("rect", x=-5, y=-5, width=10, height=10, rx=2, class_=look)


def mark(shape: int, colour: str) -> Markup:
    return marker(shape, 0, 0, 5, class_=f"fill-{colour}")


def legend(
    marks: Sequence[tuple[Markup, str]], left: Number, right: Number
) -> tuple[list[Markup], Number]:
    """What the marks stand for, set in rows, and how high that is."""
    places = wrapped([wide(words) + 36 for _, words in marks], right - left)
    drawn: list[Markup] = []
    for (mark, words), (x, row) in zip(marks, places, strict=True):
        at = (left + x + 8, 8.0 + _LINE * row)
        drawn.append(tag("g", mark, transform=f"translate({at[0]:.1f} {at[1]:.1f})"))
        drawn.append(label(at[0] + 14, at[1] + 4, words))
    return drawn, _LINE * (places[-1][1] + 1) if places else 0.0
