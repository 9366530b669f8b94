"""Pictures of how good models are, as SVG: what they show is also told in words and in tables."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from layerwise.core.telling.outcome import Sweep, SweepPoint
from layerwise.report._colours import SERIES, style
from layerwise.report._svg import (
    Axis,
    Box,
    axis,
    drawing,
    frame,
    inside,
    label,
    legend,
    line,
    mark,
    marker,
    meet,
    path,
    tag,
    upright,
    wide,
)
from layerwise.report._words import Number, finite, number, plural, round_number, round_size, size

_MARGIN = 14  # pixels around a picture that is a file of its own


def quality_strip(kl: Number, floor: Number | None, predicted: Number | None) -> Markup | None:
    """KL divergences of one model on a line: the self-noise floor, the forecast, the measured.

    Returns:
        None if there is nothing to compare the measured one with.
    """
    marks = [("self-noise", floor, "kept"), ("foreseen", predicted, "series-1")]
    shown = [(name, value, colour) for name, value, colour in marks if value and value > 0]
    if not shown or not kl > 0 or not finite(kl):
        return None
    shown.append(("measured", kl, "accent"))
    x = axis([value for _, value, _ in shown], 30, 270, log=True, room=0.0)
    y = 30.0
    drawn = [line(16, y, 284, y, class_="stroke-edge", stroke_width=2)]
    low: list[Box] = []
    for name, value, colour in sorted(shown, key=lambda one: one[1]):
        place, half = x.at(value), wide(name, 11) / 2
        box = (place - half, 0.0, place + half, 1.0)
        under = any(meet(box, other) for other in low)
        low += [] if under else [box]
        drawn.append(marker(0, place, y, 5, class_=f"fill-{colour} stroke-card", stroke_width=1.5))
        text = {"class_": "small fill-muted", "text_anchor": "middle"}
        drawn.append(label(place, y + 20 if under else y - 11, name, **text))
    told = ", ".join(f"{name} {number(value)}" for name, value, _ in shown)
    return drawing(300, 58, *drawn, title="KL divergence, on a logarithmic line", told=told)


def pareto_svg(sweep: Sweep) -> str:
    """Size against KL divergence (perplexity where no point has one), as an SVG file of its own.

    It has its own colours, for light and dark, and fetches nothing.

    Args:
        sweep: What was tried; points that were not compared are left out.
    """
    return alone(pareto(sweep))


@dataclass(frozen=True, slots=True)
class _Point:
    """A point of a sweep with its place, and how its method is drawn."""

    of: SweepPoint
    quality: Number
    x: Number
    y: Number
    shape: int
    colour: str


def pareto(sweep: Sweep, *, width: Number = 760) -> Markup:
    """The same, to stand in a page.

    Args:
        sweep: What was tried.
        width: In pixels.
    """
    name, value = _quality(sweep)
    known = {n: v for n, p in enumerate(sweep.points) if finite(v := value(p)) and v is not None}
    if not known:
        words = "No point was compared with the original."
        return drawing(width, 60, label(16, 34, words), title=f"Sweep of {sweep.model}", told=words)
    held = [sweep.points[n] for n in known]
    looks = _looks(held)
    left, right = 66.0, width - 18
    marks = [(mark(*look), method) for method, look in looks.items()]
    if any(point.front for point in held):
        marks.append((_front_mark(), "front: none is both smaller and better"))
    key, top = legend(marks, left, right)
    bottom = top + 30 + min(0.62 * width, 400)
    x = axis([point.bytes for point in held], left, right, room=0.1)
    floor = _floor(sweep, name)
    y = axis([*known.values(), *_near(floor, known.values())], bottom, top + 22)
    points = [
        _Point(p, v, x.at(p.bytes), y.at(v), *looks[p.method])
        for p, v in zip(held, known.values(), strict=True)
    ]
    points.sort(key=lambda point: point.x)
    taken: list[Box] = []
    drawn = [
        tag("g", *key, transform="translate(0 8)"),
        *frame(x, y, round_size, round_number, 6 if width > 500 else 3),
        *(_floor_line(floor, y, left, right, taken) if floor else ()),
        *_front(points),
        *_lines(points, taken),
        *(_marked(point, name) for point in points),
        *_labels(points, (left, top, right + 14, bottom), taken),
        label((left + right) / 2, bottom + 40, "weight files", text_anchor="middle"),
        upright(14, (y.start + y.end) / 2, name),
    ]
    return drawing(
        width,
        bottom + 52,
        *drawn,
        title=f"Size against quality: {sweep.model}",
        told=f"{plural(len(held), 'point')} of {', '.join(looks)}; {name} against the size of "
        f"the weight files; {sum(p.front for p in held)} on the Pareto front",
    )


def _quality(sweep: Sweep) -> tuple[str, Callable[[SweepPoint], Number | None]]:
    if any(finite(point.kl) for point in sweep.points):
        return "KL to the original, nats", lambda point: point.kl
    return "perplexity", lambda point: point.perplexity


def _looks(points: Sequence[SweepPoint]) -> dict[str, tuple[int, str]]:
    """Shape and colour of each method; those that treat all layers alike are grey."""
    methods = dict.fromkeys(point.method for point in points)
    uniform = {point.method for point in points if point.uniform}
    others = [method for method in methods if method not in uniform]
    looks: dict[str, tuple[int, str]] = {}
    for method in methods:
        place = others.index(method) if method in others else len(looks)
        looks[method] = (place, "kept" if method in uniform else f"series-{place % SERIES}")
    return looks


def _floor(sweep: Sweep, name: str) -> tuple[str, float] | None:
    """What a point can be no better than, in words and as a figure."""
    if name == "perplexity":
        before = sweep.original
        return ("the original", before.perplexity) if before else None
    noise = sweep.noise_floor
    return ("self-noise floor", noise.kl) if noise and noise.kl is not None else None


def _near(floor: tuple[str, float] | None, values: Iterable[Number]) -> list[Number]:
    """The floor, if it is so near that the points still have most of the picture."""
    held = sorted(values)
    if floor is None or not finite(floor[1]) or min(floor[1], held[0]) <= 0:
        return []
    below, spread = math.log(held[0] / floor[1]), math.log(held[-1] / held[0])
    return [floor[1]] if below < max(spread / 2, 1.0) else []


def _floor_line(
    floor: tuple[str, float], y: Axis, left: Number, right: Number, taken: list[Box]
) -> list[Markup]:
    words = f"{floor[0]} {number(floor[1])}"
    if y.low <= floor[1] <= y.high:
        place = y.at(floor[1])
        look = {"class_": "stroke-kept", "stroke_dasharray": "6 4"}
        drawn = [line(left, place, right, place, **look)]
    else:
        words, place = f"{words}, below this picture", y.start
        drawn = []
    at = (left + 6, place - 6)
    taken.append((at[0], at[1] - 11, at[0] + wide(words), at[1] + 3))
    return [*drawn, label(*at, words)]


def _front(points: Sequence[_Point]) -> list[Markup]:
    """Stairs: from a point on, nothing better is known until the next."""
    front = [point for point in points if point.of.front]
    if len(front) < 2:
        return []
    stairs = [(front[0].x, front[0].y)]
    for before, after in pairwise(front):
        stairs += [(after.x, before.y), (after.x, after.y)]
    return [path(stairs, class_="stroke-accent", stroke_width=5, opacity=0.25)]


def _lines(points: Sequence[_Point], taken: list[Box]) -> list[Markup]:
    """A line through the points of each method; labels keep clear of it."""
    drawn: list[Markup] = []
    for method in dict.fromkeys(point.of.method for point in points):
        held = [point for point in points if point.of.method == method]
        look = {"class_": f"stroke-{held[0].colour}", "stroke_width": 1.5}
        dash = "3 3" if held[0].of.uniform else None
        drawn.append(path([(p.x, p.y) for p in held], stroke_dasharray=dash, **look))
        for a, b in pairwise(held):
            for step in range(21):
                x, y = (a.x + (b.x - a.x) * step / 20, a.y + (b.y - a.y) * step / 20)
                taken.append((x - 1, y - 1, x + 1, y + 1))
    taken += [(p.x - 6, p.y - 6, p.x + 6, p.y + 6) for p in points]
    return drawn


def _marked(point: _Point, name: str) -> Markup:
    of = point.of
    told = (
        f"{of.method} at {of.budget}: {size(of.bytes)}, {number(of.bits)} bits stored per weight, "
        f"{name} {number(point.quality)}"
    )
    look = {"class_": f"fill-{point.colour} stroke-card", "stroke_width": 1.2}
    return marker(point.shape, point.x, point.y, 5, tag("title", told), **look)


def _labels(points: Sequence[_Point], room: Box, taken: list[Box]) -> list[Markup]:
    """What is on the front, named as fully as there is room for."""
    drawn: list[Markup] = []
    for point in points:
        of = point.of
        for words in (f"{of.method} {of.budget}", of.budget) if of.front else ():
            if found := _room_beside(point, words, room, taken):
                box, at, anchor = found
                taken.append(box)
                drawn.append(label(*at, words, class_="small fill-ink", text_anchor=anchor))
                break
    return drawn


def _room_beside(
    point: _Point, words: str, room: Box, taken: Sequence[Box]
) -> tuple[Box, tuple[Number, Number], str] | None:
    """Where a label meets nothing: its box, its place and how it is anchored."""
    long = wide(words, 11)
    for dx, dy, anchor in (
        (-8, 15, "end"),
        (0, 19, "middle"),
        (9, 15, "start"),
        (9, -7, "start"),
        (0, -11, "middle"),
        (10, 4, "start"),
        (-10, 4, "end"),
        (-8, -7, "end"),
    ):
        at = (point.x + dx, point.y + dy)
        start = at[0] - {"start": 0.0, "middle": long / 2, "end": long}[anchor]
        box = (start, at[1] - 9, start + long, at[1] + 2)
        if inside(box, room) and not any(meet(box, other) for other in taken):
            return box, at, anchor
    return None


def _front_mark() -> Markup:
    return line(-8, 0, 8, 0, class_="stroke-accent", stroke_width=5, opacity=0.3)


def alone(picture: Markup) -> str:
    """The same picture as a file of its own: with its colours, on a ground, with a margin."""
    head, _, body = str(picture).partition("</desc>")
    drawn, _, rest = head.partition('viewBox="')
    box, _, told = rest.partition('"')
    width, height = (float(side) + 2 * _MARGIN for side in box.split()[2:])
    ground = tag("rect", x=-_MARGIN, y=-_MARGIN, width=width, height=height, class_="fill-card")
    content = f"{ground}{body}"
    sides = f'width="{width:g}" height="{height:g}"'
    seen = f'viewBox="-{_MARGIN} -{_MARGIN} {width:g} {height:g}"'
    opened = drawn.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" {sides} ', 1)
    return f"{opened}{seen}{told}</desc><style>{style(used_in=content)}</style>{content}\n"
