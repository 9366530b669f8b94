"""The parts of a drawing: elements, colours for light and dark, axes with their ticks."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

STEPS = 9
SERIES = 8
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif'


def tag(name: str, *inside: str, **attributes: str | float | None) -> Markup:
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
    return Markup(f"<{name}{written}>{body}</{name}>")  # noqa: S704 - every part is escaped


def _plain(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")


def label(x: float, y: float, words: str, **attributes: str | float | None) -> Markup:
    """A line of text; muted unless a class is given."""
    return tag("text", words, x=x, y=y, **{"class_": "fill-muted", **attributes})


def line(x1: float, y1: float, x2: float, y2: float, **attributes: str | float | None) -> Markup:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, **attributes)


def path(points: Iterable[tuple[float, float]], **attributes: str | float | None) -> Markup:
    """A line through points."""
    drawn = "L".join(f"{_plain(x)} {_plain(y)}" for x, y in points)
    return tag("path", d=f"M{drawn}", fill="none", **attributes)


def dots(points: Iterable[tuple[float, float]], radius: float, **attributes: str) -> Markup:
    """Many dots in one element, of the class's stroke."""
    drawn = "".join(f"M{_plain(x)} {_plain(y)}h0" for x, y in points)
    width = 2 * radius
    return tag("path", d=drawn, fill="none", stroke_linecap="round", stroke_width=width, **attributes)


def marker(
    shape: int, x: float, y: float, radius: float, *inside: str, **attributes: str | float | None
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
    width: float, height: float, *inside: str, title: str, told: str, class_: str | None = None
) -> Markup:
    """A picture with a title, and its content told in words for those who do not see it."""
    return tag(
        "svg",
        tag("title", title),
        tag("desc", told),
        *inside,
        viewBox=f"0 0 {_plain(width)} {_plain(height)}",
        role="img",
        aria_label=f"{title}. {told}",
        class_=class_,
    )


def alone(picture: Markup) -> str:
    """The same picture as a file of its own, with its colours and a ground to stand on."""
    box = picture.partition('viewBox="')[2].partition('"')[0].split()
    ground = tag("rect", width="100%", height="100%", class_="fill-card")
    head, _, rest = str(picture).partition("</desc>")
    opened = head.replace(
        "<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{box[2]}" height="{box[3]}" ', 1
    )
    body = f"{ground}{rest}"
    return f"{opened}</desc><style>{style(used_in=body)}</style>{body}\n"


# Colours


def _ramp(*stops: str) -> list[str]:
    """Evenly spaced colours through some."""
    channels = [[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in stops]
    made: list[str] = []
    for step in range(STEPS):
        at = step * (len(stops) - 1) / (STEPS - 1)
        left = min(int(at), len(stops) - 2)
        mixed = [
            round(a + (b - a) * (at - left))
            for a, b in zip(channels[left], channels[left + 1], strict=True)
        ]
        made.append("#{:02x}{:02x}{:02x}".format(*mixed))
    return made


def contrast(first: str, second: str) -> float:
    """The contrast ratio of two colours as WCAG 2 defines it, from 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def _palette(
    plain: Mapping[str, str], series: Sequence[str], ramps: Mapping[str, Sequence[str]]
) -> Mapping[str, str]:
    colours = dict(plain) | {f"series-{n}": colour for n, colour in enumerate(series)}
    for name, stops in ramps.items():
        for step, colour in enumerate(_ramp(*stops)):
            colours[f"{name}-{step}"] = colour
            colours[f"on-{name}-{step}"] = max(
                ("#10151c", "#ffffff"), key=lambda ink, ground=colour: contrast(ink, ground)
            )
    return colours


LIGHT = _palette(
    {
        **{"page": "#f5f6f8", "card": "#ffffff", "sunk": "#eef0f4"},
        **{"ink": "#161b22", "muted": "#57606b", "grid": "#e4e7ec", "edge": "#d5dae1"},
        **{"accent": "#1f5fcc", "good": "#167a46", "before": "#d9dee7", "kept": "#8b95a5"},
    },
    ("#1f66d0", "#c2570c", "#12823f", "#8a3fc9", "#c92a3c", "#0a7d88", "#85581f", "#b92a84"),
    {
        "cool": ("#dce8fb", "#4c84da", "#0b2c6e"),
        "warm": ("#fdebd8", "#dd7429", "#6f1d05"),
        "leaf": ("#dcf1e5", "#349a68", "#073f28"),
    },
)
DARK = _palette(
    {
        **{"page": "#0f1318", "card": "#181d24", "sunk": "#11161c"},
        **{"ink": "#e7eaee", "muted": "#a2acb8", "grid": "#29313b", "edge": "#333c48"},
        **{"accent": "#7fb0ff", "good": "#5fd394", "before": "#323b48", "kept": "#7b8797"},
    },
    ("#6aa9ff", "#f39a45", "#4fca86", "#c290ff", "#ff7d86", "#3ecbd5", "#cda56d", "#f583c5"),
    {
        "cool": ("#22314a", "#4a80d8", "#d3e3ff"),
        "warm": ("#402a1d", "#cf6a2b", "#ffdfc7"),
        "leaf": ("#1d3a2d", "#2f9465", "#ccf5df"),
    },
)


def style(used_in: str | None = None) -> Markup:
    """Rules for `fill-NAME` and `stroke-NAME` in light and dark, and for the text of drawings.

    Args:
        used_in: Only the colours that this drawing uses.
    """

    def rules(colours: Mapping[str, str]) -> str:
        return "".join(
            f".{way}-{name}{{{way}:{colour}}}"
            for name, colour in colours.items()
            for way in ("fill", "stroke")
            if used_in is None or f"{way}-{name}" in used_in
        )

    text = f"svg text{{font:12px {_FONT};font-variant-numeric:tabular-nums}}"
    strong = "svg text.strong{font-weight:600}svg text.small{font-size:11px}"
    dark = f"@media (prefers-color-scheme:dark){{{rules(DARK)}}}"
    return Markup(f"{text}{strong}{rules(LIGHT)}{dark}")  # noqa: S704 - all of it is ours


def variables() -> Markup:
    """The plain colours as CSS variables, for what is not drawn."""

    def declared(colours: Mapping[str, str]) -> str:
        plain = {name: colour for name, colour in colours.items() if "-" not in name}
        return "".join(f"--{name}:{colour};" for name, colour in plain.items())

    dark = f"@media (prefers-color-scheme:dark){{:root{{{declared(DARK)}}}}}"
    return Markup(f":root{{{declared(LIGHT)}}}{dark}")  # noqa: S704 - all of it is ours


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
    """

    low: float
    high: float
    start: float
    end: float
    log: bool

    def at(self, value: float) -> float:
        """The place of a value, inside the axis."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values to label, about `count` of them."""
        if self.log and self.high / self.low >= 10:
            return self._decades(count)
        rough = (self.high - self.low) / count
        power = 10 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(n * step, 12) for n in range(first, last + 1)]

    def _decades(self, count: int) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for parts in ((1, 2, 5), (1, 3), (1,)):
            made = [float(f"{part}e{power}") for power in powers for part in parts]
            inside = [tick for tick in made if self.low <= tick <= self.high]
            if len(inside) <= count + 1:
                return inside
        return inside[:: math.ceil(len(inside) / (count + 1))]


def axis(
    values: Iterable[float], start: float, end: float, *, log: bool | None = None, room: float = 0.06
) -> Axis:
    """An axis that holds some values, with some room at its ends.

    Args:
        values: At least one.
        start: Place of the lowest value.
        end: Place of the highest value.
        log: Whether it is logarithmic; None where the largest is 20 times the smallest or more.
        room: Share of the axis to leave at each end.
    """
    held = sorted(values)
    positive = [value for value in held if value > 0]
    if log is None:
        log = positive == held and held[-1] >= 20 * held[0]
    if log and positive:
        low, high = positive[0], positive[-1]
        ratio = max(high / low, 2.0) ** room
        low, high = (low / 1.5, high * 1.5) if high / low < 2 else (low / ratio, high * ratio)
        # What is zero lies apart, below the smallest that is not.
        return Axis(low if positive == held else low / (high / low) ** 0.1, high, start, end, True)
    low, high = held[0], held[-1]
    span = (high - low) or abs(high) or 1.0
    below = low - room * span
    return Axis(max(below, 0.0) if low >= 0 else below, high + room * span, start, end, False)


# Labels that keep clear of each other

Box = tuple[float, float, float, float]


def wide(words: str, points: float = 12) -> float:
    """About how wide a line of text is."""
    return 0.57 * points * len(words)


def meet(first: Box, second: Box) -> bool:
    """Whether two boxes (left, top, right, bottom) overlap."""
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


def wrapped(widths: Sequence[float], room: float) -> list[tuple[float, int]]:
    """Where things of some widths stand, (x, row), when they are set in rows."""
    places: list[tuple[float, int]] = []
    x, row = 0.0, 0
    for width in widths:
        if x and x + width > room:
            x, row = 0.0, row + 1
        places.append((x, row))
        x += width
    return places


def lower_hull(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of some (cost, error) that no cheaper one is as good as, cheapest first."""
    kept: list[tuple[float, float]] = []
    for cost, error in sorted(points):
        if not kept or error < kept[-1][1]:
            kept.append((cost, error))
    return kept


def between(places: Sequence[float]) -> float:
    """The smallest gap of places in order."""
    return min((b - a for a, b in pairwise(places)), default=0.0)
