"""Pictures of how good models are, as SVG: what they show is also told in words and in tables."""

import math
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup

from layerwise.core.outcome import Sweep, SweepPoint
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
from layerwise.report._words import finite, number, percent, plural, size


def quality_strip(kl: float, floor: float | None, predicted: float | None) -> Markup | None:
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
    return _alone(pareto(sweep))


def pareto(sweep: Sweep, *, width: float = 760, crowded: bool = False) -> Markup:
    """The same, to stand in a page.

    Args:
        sweep: What was tried.
        width: In pixels.
        crowded: Only points on the front are labelled.
    """
    name, value = _quality(sweep)
    pairs = [(p, v) for p in sweep.points if (v := value(p)) is not None and math.isfinite(v)]
    if not pairs:
        words = "No point was compared with the original."
        return drawing(width, 60, label(16, 34, words), title=f"Sweep of {sweep.model}", told=words)
    methods = list(dict.fromkeys(point.method for point, _ in pairs))
    looks = _looks(methods, {point.method for point, _ in pairs if point.uniform})
    left, right = 66.0, width - 18
    marks = [(mark(*looks[method]), method) for method in methods]
    if any(point.front for point, _ in pairs):
        marks.append((_front_mark(), "front: none is both smaller and better"))
    key, top = legend(marks, left, right)
    bottom = top + 30 + min(0.62 * width, 400)
    x = axis([point.bytes for point, _ in pairs], left, right)
    floor = _floor(sweep, name)
    least = min(v for _, v in pairs)
    reached = [floor[1]] if floor and floor[1] > 0 and least / floor[1] < 100 else []
    y = axis([v for _, v in pairs] + reached, bottom, top + 22)
    drawn = [tag("g", *key, transform="translate(0 8)")]
    drawn += frame(x, y, size, number, 6 if width > 500 else 3)
    taken: list[Box] = []
    if floor:
        drawn += _floor_line(floor, y, left, right, taken)
    front = [(x.at(p.bytes), y.at(v)) for p, v in sorted(pairs, key=_bytes) if p.front]
    drawn.append(
        path(_stairs(front), class_="stroke-accent", stroke_width=7, opacity=0.22)
        if front
        else Markup()
    )
    for method in methods:
        held = sorted(((p, v) for p, v in pairs if p.method == method), key=_bytes)
        colour = looks[method][1]
        dash = "3 3" if held[0][0].uniform else None
        drawn.append(
            path(
                [(x.at(p.bytes), y.at(v)) for p, v in held],
                class_=f"stroke-{colour}",
                stroke_width=1.5,
                stroke_dasharray=dash,
            )
        )
    drawn += _points(pairs, looks, x, y, name, crowded, taken)
    drawn.append(label((left + right) / 2, bottom + 40, "weight files", text_anchor="middle"))
    drawn.append(upright(14, (y.start + y.end) / 2, name))
    return drawing(
        width,
        bottom + 52,
        *drawn,
        title=f"Size against quality: {sweep.model}",
        told=f"{plural(len(pairs), 'point')} of {', '.join(methods)}; {name} against the size of "
        f"the weight files; {sum(p.front for p, _ in pairs)} on the Pareto front",
    )


def _bytes(pair: tuple[SweepPoint, float]) -> tuple[int, float]:
    return pair[0].bytes, pair[1]


def _quality(sweep: Sweep) -> tuple[str, Callable[[SweepPoint], float | None]]:
    if any(point.kl is not None for point in sweep.points):
        return "KL to the original, nats", lambda point: point.kl
    return "perplexity", lambda point: point.perplexity


def _looks(methods: Sequence[str], uniform: set[str]) -> dict[str, tuple[int, str]]:
    """Shape and colour of each method; those that treat all layers alike are grey."""
    others = [method for method in methods if method not in uniform]
    looks = {method: (n, f"series-{n % SERIES}") for n, method in enumerate(others)}
    return looks | {m: (n, "kept") for n, m in enumerate(m for m in methods if m in uniform)}


def _stairs(front: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Along a front nothing better is known than the point to the left."""
    made: list[tuple[float, float]] = []
    for x, y in front:
        made += [(x, made[-1][1])] if made else []
        made.append((x, y))
    return made if len(made) > 1 else [*made, *made]


def _floor(sweep: Sweep, name: str) -> tuple[str, float] | None:
    """What a point can be no better than, in words and as a figure."""
    if name == "perplexity":
        before = sweep.original
        return ("the original", before.perplexity) if before else None
    noise = sweep.noise_floor
    return ("self-noise floor", noise.kl) if noise and noise.kl is not None else None


def _floor_line(
    floor: tuple[str, float], y: Axis, left: float, right: float, taken: list[Box]
) -> list[Markup]:
    words = f"{floor[0]} {number(floor[1])}"
    if not y.low <= floor[1] <= y.high:
        words, place = f"{words}, below this plot", y.start
        drawn: list[Markup] = []
    else:
        place = y.at(floor[1])
        look = {"class_": "stroke-kept", "stroke_dasharray": "6 4"}
        drawn = [line(left, place, right, place, **look)]
    at = (right - 6, place - 6)
    taken.append((at[0] - wide(words), at[1] - 11, at[0], at[1] + 3))
    return [*drawn, label(*at, words, text_anchor="end")]


def _points(
    pairs: Sequence[tuple[SweepPoint, float]],
    looks: Mapping[str, tuple[int, str]],
    x: Axis,
    y: Axis,
    name: str,
    crowded: bool,
    taken: list[Box],
) -> list[Markup]:
    """Markers, and labels wherever one has room; the front comes first."""
    places = {id(p): (x.at(p.bytes), y.at(v)) for p, v in pairs}
    taken += [(px - 6, py - 6, px + 6, py + 6) for px, py in places.values()]
    room = (x.start, y.end - 8, x.end + 14, y.start)
    drawn: list[Markup] = []
    for point, value in sorted(pairs, key=lambda pair: not pair[0].front):
        px, py = places[id(point)]
        shape, colour = looks[point.method]
        look = {"class_": f"fill-{colour} stroke-card", "stroke_width": 1.2}
        told = (
            f"{point.method} at {point.budget}: {size(point.bytes)}, {number(point.bits)} bits "
            f"stored per weight, {name} {number(value)}, top-1 agreement {percent(point.top1)}"
        )
        drawn.append(marker(shape, px, py, 5, tag("title", told), **look))
        if crowded and not point.front:
            continue
        words = f"{point.method} {point.budget}" if point.front else point.budget
        if spot := _room_beside(px, py, words, taken, room):
            box, at, anchor = spot
            taken.append(box)
            colour = "ink" if point.front else "muted"
            text = {"class_": f"small fill-{colour}", "text_anchor": anchor}
            drawn.append(label(*at, words, **text))
    return drawn


def _room_beside(
    x: float, y: float, words: str, taken: Sequence[Box], room: Box
) -> tuple[Box, tuple[float, float], str] | None:
    """Where a label of a point meets nothing: its box, its place and how it is anchored."""
    long = wide(words, 11)
    for dx, dy, anchor in (
        (9, -7, "start"),
        (9, 13, "start"),
        (-9, 13, "end"),
        (-9, -7, "end"),
        (0, -12, "middle"),
        (0, 20, "middle"),
    ):
        at = (x + dx, y + dy)
        start = at[0] - {"start": 0.0, "middle": long / 2, "end": long}[anchor]
        box = (start, at[1] - 10, start + long, at[1] + 3)
        if inside(box, room) and not any(meet(box, other) for other in taken):
            return box, at, anchor
    return None


def _front_mark() -> Markup:
    return line(-8, 0, 8, 0, class_="stroke-accent", stroke_width=7, opacity=0.3)


def _alone(picture: Markup) -> str:
    """The same picture as a file of its own, with its colours and a ground to stand on."""
    box = picture.partition('viewBox="')[2].partition('"')[0].split()
    ground = tag("rect", width="100%", height="100%", class_="fill-card")
    head, _, rest = str(picture).partition("</desc>")
    opened = head.replace(
        "<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{box[2]}" height="{box[3]}" ', 1
    )
    body = f"{ground}{rest}"
    return f"{opened}</desc><style>{style(used_in=body)}</style>{body}\n"
