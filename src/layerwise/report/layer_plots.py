"""Pictures of the layers of a run, as SVG: what they show is also told in words and in tables."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from layerwise.core.telling.outcome import Candidate, LayerRow
from layerwise.report._colours import SERIES, STEPS
from layerwise.report._svg import (
    Axis,
    Box,
    axis,
    dots,
    drawing,
    frame,
    label,
    legend,
    level,
    line,
    lower_hull,
    mark,
    marker,
    path,
    swatch,
    tag,
    upright,
    wide,
)
from layerwise.report._words import Number, finite, number, plural, round_number, round_size, size

# Lines in one panel of error curves: more of them are no picture any more.
_MOST_LINES = 64


# Layers by role


def roles(rows: Sequence[LayerRow]) -> dict[str, list[LayerRow]]:
    """Layers with the same role, together, in order."""
    grouped: dict[str, list[LayerRow]] = {}
    for row in rows:
        grouped.setdefault(row.role or "layers", []).append(row)
    return grouped


def blocks(rows: Sequence[LayerRow]) -> dict[str, list[LayerRow]]:
    """Layers of the same block, together, in order."""
    grouped: dict[str, list[LayerRow]] = {}
    for row in rows:
        grouped.setdefault(row.block, []).append(row)
    return grouped


def short(names: Sequence[str]) -> list[str]:
    """The names without the dotted words that all of them begin with."""
    split = [name.split(".") for name in names]
    shared = 0
    while all(len(words) > shared + 1 for words in split) and (
        len({words[shared] for words in split}) == 1
    ):
        shared += 1
    shortened = [".".join(words[shared:]) for words in split]
    return [name or "outside" for name in shortened]


# Bytes block by block


def block_columns(rows: Sequence[LayerRow], *, width: Number = 960) -> Markup:
    """A column per block: its bytes before, and on it those after, by role."""
    grouped, kinds = blocks(rows), list(roles(rows))
    most = max(sum(row.bytes_before for row in held) for held in grouped.values())
    most = max(most, *(sum(row.bytes_after for row in held) for held in grouped.values()), 1)
    left, right, top = 62.0, width - 8, 12.0
    key, height = legend([(swatch(n), kind) for n, kind in enumerate(kinds)], left, width - 8)
    bottom = 210.0
    y = Axis(0, most * 1.04, bottom, top, log=False)
    step = (right - left) / len(grouped)
    drawn = [level(y, tick, left, right, round_size(tick)) for tick in y.ticks(4)]
    for place, (name, held) in enumerate(grouped.items()):
        x, thick = left + step * (place + 0.12), step * 0.76
        before = sum(row.bytes_before for row in held)
        parts = [_column(x, thick, y.at(before), bottom, "fill-before")]
        reached = 0.0
        for number_, kind in enumerate(kinds):
            grown = reached + sum(r.bytes_after for r in held if (r.role or "layers") == kind)
            if grown > reached:
                colour = f"fill-series-{number_ % SERIES}"
                parts.append(_column(x, thick, y.at(grown), y.at(reached), colour))
            reached = grown
        told = f"{name or 'outside the blocks'}: {size(before)} before, {size(reached)} after"
        drawn.append(tag("g", tag("title", told), *parts))
    drawn += _block_names(list(grouped), left, step, bottom + 16)
    drawn.append(label((left + right) / 2, bottom + 36, "block", text_anchor="middle"))
    drawn.append(tag("g", *key, transform=f"translate(0 {bottom + 58})"))
    return drawing(
        width,
        bottom + 58 + height,
        *drawn,
        title="Bytes of each block",
        told=f"{plural(len(grouped), 'block')}; pale columns are bytes before, coloured ones after",
    )


def _column(x: Number, thick: Number, top: Number, bottom: Number, colour: str) -> Markup:
    return tag("rect", x=x, y=top, width=thick, height=max(bottom - top, 0.5), class_=colour)


def _block_names(names: Sequence[str], left: Number, step: Number, y: Number) -> list[Markup]:
    """The names of blocks under their columns, as many as there is room for."""
    shown = short(names)
    every = max(1, math.ceil((max(map(wide, shown)) + 8) / step))
    return [
        label(left + step * (place + 0.5), y, name, text_anchor="middle")
        for place, name in enumerate(shown)
        if place % every == 0
    ]


# Error curves


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture of several that belong together."""

    name: str
    note: str
    picture: Markup


def error_curves(rows: Sequence[LayerRow]) -> list[Panel]:
    """A panel per role: bytes against predicted error, a line per layer, the chosen point marked.

    All panels have the same vertical axis, so that they can be compared.
    """
    known = [row for row in rows if _curve(row)]
    errors = [candidate.error for row in known for candidate in _curve(row)]
    if not errors:
        return []
    depth = {name: place for place, name in enumerate(blocks(rows))}
    ramp = {name: 2 + round(6 * place / max(len(depth) - 1, 1)) for name, place in depth.items()}
    return [
        _curves(role, _spread(held), len(held), errors, ramp) for role, held in roles(known).items()
    ]


def _curve(row: LayerRow) -> list[Candidate]:
    return [candidate for candidate in row.curve if finite(candidate.error)]


def _spread(rows: Sequence[LayerRow]) -> list[LayerRow]:
    """At most so many of them as can be told apart, evenly spaced."""
    every = math.ceil(len(rows) / _MOST_LINES)
    return list(rows[::every])


def _curves(
    role: str,
    rows: Sequence[LayerRow],
    count: int,
    errors: Sequence[Number],
    ramp: Mapping[str, int],
) -> Panel:
    width, height, left, bottom = 340.0, 250.0, 56.0, 204.0
    candidates = [candidate for row in rows for candidate in _curve(row)]
    x = axis([c.bytes for c in candidates], left, width - 14, log=False)
    y = axis(errors, bottom, 12)
    drawn = frame(x, y, round_size, round_number)
    cloud = [(x.at(c.bytes), y.at(c.error)) for c in candidates]
    drawn.append(dots(cloud, 1.6, class_="stroke-edge"))
    for row in rows:
        hull = lower_hull((c.bytes, c.error) for c in _curve(row))
        colour = f"cool-{ramp[row.block]}"
        drawn.append(
            path(
                [(x.at(cost), y.at(error)) for cost, error in hull],
                class_=f"stroke-{colour}",
                stroke_width=1.6 if len(rows) < 12 else 0.9,
                stroke_linejoin="round",
            )
        )
    for row in rows:
        for c in _curve(row):
            if c.chosen:
                told = f"{row.layer}: {c.label}, {size(c.bytes)}, predicted {number(c.error)}"
                place = {"cx": x.at(c.bytes), "cy": y.at(c.error), "r": 4.2}
                look = {"class_": "fill-series-1 stroke-card", "stroke_width": 1.2}
                drawn.append(tag("circle", tag("title", told), **place, **look))
    drawn.append(label((left + width - 14) / 2, height - 6, "stored", text_anchor="middle"))
    note = plural(count, "layer")
    if len(rows) < count:
        note = f"{len(rows)} of {count} layers, evenly spaced over the model"
    picture = drawing(
        width,
        height,
        *drawn,
        title=f"Error curves of {role}",
        told=f"{note}: bytes against predicted error; the chosen points are marked",
    )
    return Panel(role, note, picture)


# Heat maps


@dataclass(frozen=True, slots=True)
class Scale:
    """How a figure of layers is shown as heat.

    Attributes:
        name: Of the figure.
        value: Takes it from a row; None where there is none.
        ramp: Colours.
        write: The figure in words.
    """

    name: str
    value: Callable[[LayerRow], Number | None]
    ramp: str
    write: Callable[[Number], str]


def heat_map(rows: Sequence[LayerRow], scale: Scale) -> Markup | None:
    """A cell per block and role; several layers in one are averaged, weight for weight.

    Returns:
        None if no layer has the figure.
    """
    cells = _cells(rows, scale)
    if not cells:
        return None
    names, kinds = list(blocks(rows)), list(roles(rows))
    held = [value for value, _ in cells.values()]
    log = min(held) > 0 and max(held) / min(held) > 30
    heat = Axis(min(held), max(held), 0, STEPS - 1, log) if max(held) > min(held) else None
    shown = short(names)
    left = max(map(wide, kinds)) + 14
    cell = min(max(880 / len(names), 15), 74)
    # A figure is written into a cell that has the room for it.
    written = cell >= max(wide(scale.write(value), 11) for value in held) + 4
    tall = 24 if written else max(min(cell, 22), 15)
    slanted = max(map(wide, shown)) > cell * 3
    top = 12 + (max(map(wide, shown)) * 0.8 if slanted else 12)
    drawn = _heads(shown, left, cell, top - 6, slanted)
    for across, name in enumerate(names):
        for down, kind in enumerate(kinds):
            x, y = left + across * cell, top + down * tall
            if found := cells.get((name, kind)):
                drawn.append(_cell(found, heat, scale, (x, y, cell, tall), written))
    for down, kind in enumerate(kinds):
        y = top + (down + 0.5) * tall + 4
        drawn.append(label(left - 8, y, kind, class_="fill-ink", text_anchor="end"))
    bottom = top + tall * len(kinds) + 20
    drawn.append(_heat_legend(scale, min(held), max(held), 8, bottom))
    return drawing(
        max(left + cell * len(names) + 8, left + 330),
        bottom + 22,
        *drawn,
        title=f"{scale.name} by block and role",
        told=f"from {scale.write(min(held))} to {scale.write(max(held))}; "
        f"{plural(len(names), 'block')} across, {plural(len(kinds), 'role')} down",
        sized=True,
    )


def _cells(rows: Sequence[LayerRow], scale: Scale) -> dict[tuple[str, str], tuple[Number, str]]:
    """The figure of each block and role, and what it stands for."""
    grouped: dict[tuple[str, str], list[tuple[float, LayerRow]]] = {}
    for row in rows:
        value = scale.value(row)
        if value is not None and math.isfinite(value):
            grouped.setdefault((row.block, row.role or "layers"), []).append((value, row))
    made: dict[tuple[str, str], tuple[Number, str]] = {}
    for place, held in grouped.items():
        weights = sum(row.rows * row.width for _, row in held)
        mean = sum(value * row.rows * row.width for value, row in held) / weights
        name = held[0][1].layer if len(held) == 1 else f"{place[0]}, {len(held)} of {place[1]}"
        made[place] = (mean, f"{name}: {scale.name} {scale.write(mean)}")
    return made


def _cell(
    found: tuple[Number, str], heat: Axis | None, scale: Scale, box: Box, written: bool
) -> Markup:
    value, told = found
    x, y, wide_, tall = box
    step = f"{scale.ramp}-{round(heat.at(value)) if heat else STEPS // 2}"
    parts = [tag("title", told)]
    parts.append(
        tag(
            "rect",
            x=x + 0.75,
            y=y + 0.75,
            width=wide_ - 1.5,
            height=tall - 1.5,
            rx=3 if written else 2,
            class_=f"fill-{step}",
        )
    )
    if written:
        middle = (x + wide_ / 2, y + tall / 2 + 4)
        text = {"class_": f"small fill-on-{step}", "text_anchor": "middle"}
        parts.append(label(*middle, scale.write(value), **text))
    return tag("g", *parts)


def _heads(
    names: Sequence[str], left: Number, cell: Number, y: Number, slanted: bool
) -> list[Markup]:
    if not slanted:
        return _block_names_at(names, left, cell, y)
    drawn: list[Markup] = []
    every = max(1, math.ceil(14 / cell))
    for place, name in enumerate(names):
        if place % every == 0:
            x = left + (place + 0.5) * cell
            drawn.append(label(x, y, name, transform=f"rotate(-50 {x:.1f} {y:.1f})"))
    return drawn


def _block_names_at(names: Sequence[str], left: Number, cell: Number, y: Number) -> list[Markup]:
    every = max(1, math.ceil((max(map(wide, names)) + 4) / cell))
    return [
        label(left + (place + 0.5) * cell, y, name, text_anchor="middle")
        for place, name in enumerate(names)
        if place % every == 0
    ]


def _heat_legend(scale: Scale, low: Number, high: Number, x: Number, y: Number) -> Markup:
    first, last = scale.write(low), scale.write(high)
    start = x + wide(first) + 8
    parts = [label(x, y + 10, first)]
    steps = range(STEPS) if high > low else [STEPS // 2]
    for place, step in enumerate(steps):
        look = f"fill-{scale.ramp}-{step}"
        parts.append(tag("rect", x=start + 16 * place, y=y, width=16, height=12, class_=look))
    if high > low:
        parts.append(label(start + 16 * STEPS + 8, y + 10, last))
    return tag("g", *parts)


# Predicted against measured


def kl_scatter(rows: Sequence[LayerRow]) -> Markup | None:
    """A point per layer: the KL divergence it was foreseen to bring, and the one it brings.

    Returns:
        None if fewer than two layers have both, above zero.
    """
    held = [(row, row.predicted_kl, row.measured_kl) for row in rows]
    pairs = [(r, p, m) for r, p, m in held if p and m and finite(p) and finite(m) and min(p, m) > 0]
    if len(pairs) < 2:
        return None
    kinds = list(roles([row for row, _, _ in pairs]))
    width, left, bottom = 440.0, 66.0, 350.0
    both = [value for _, p, m in pairs for value in (p, m)]
    x = axis(both, left, width - 14, log=True)
    y = axis(both, bottom, bottom - (width - 14 - left), log=True)
    drawn = frame(x, y, round_number, round_number, 4)
    dashed = {"class_": "stroke-kept", "stroke_dasharray": "4 4"}
    drawn.append(line(x.start, y.start, x.end, y.end, **dashed))
    for row, predicted, measured in pairs:
        kind = kinds.index(row.role or "layers")
        told = f"{row.layer}: predicted {number(predicted)}, measured {number(measured)} nats"
        look = {"class_": f"fill-series-{kind % SERIES} stroke-card", "stroke_width": 0.8}
        shape = kind % 4
        drawn.append(marker(shape, x.at(predicted), y.at(measured), 4, tag("title", told), **look))
    drawn.append(label((left + width) / 2, bottom + 38, "predicted KL, nats", text_anchor="middle"))
    middle = (y.start + y.end) / 2
    drawn.append(upright(14, middle, "measured KL, nats"))
    marks = [(mark(n, f"series-{n % SERIES}"), kind) for n, kind in enumerate(kinds)]
    marks.append((line(-9, 0, 9, 0, **dashed), "as foreseen"))
    key, height = legend(marks, left, width - 14)
    drawn.append(tag("g", *key, transform=f"translate(0 {bottom + 56})"))
    return drawing(
        width,
        bottom + 56 + height,
        *drawn,
        title="Predicted against measured KL divergence",
        told=f"{plural(len(pairs), 'layer')}; on the dashed line they are equal",
    )
