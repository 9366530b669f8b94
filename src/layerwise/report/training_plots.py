"""Pictures of measures through training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from layerwise.report._svg import axis, drawing, frame, label, path, tag
from layerwise.report._words import Number, plural, round_number
from layerwise.report.plots import alone

_WIDE, _HIGH, _ACROSS = 380.0, 250.0, 2
_PALE, _STRONG = 2, 8  # of the ramp: the first layers and the last


@dataclass(frozen=True, slots=True)
class Record:
    """What was found at one step.

    Attributes:
        step: Its number.
        told: What else is known of it, such as the loss.
        scores: Of each layer, by measure and then by layer.
    """

    step: int
    told: Mapping[str, float]
    scores: Mapping[str, Mapping[str, float]]


def training_svg(records: Sequence[Record]) -> str:
    """A panel per measure and per figure told: steps across, a line per layer, as an SVG file.

    Args:
        records: In the order of their steps.
    """
    panels: dict[str, dict[str, list[tuple[Number, Number]]]] = {}
    for record in records:
        columns = {**{name: {name: value} for name, value in record.told.items()}, **record.scores}
        for name, column in columns.items():
            for layer, value in column.items():
                if math.isfinite(value):
                    points = panels.setdefault(name, {}).setdefault(layer, [])
                    points.append((record.step, value))
    if not panels:
        words = "Nothing was recorded."
        return alone(drawing(360, 40, label(8, 24, words), title="Training", told=words))
    drawn = [
        tag("g", *_panel(name, lines), transform=f"translate({x:.1f} {y:.1f})")
        for (name, lines), (x, y) in zip(panels.items(), _places(len(panels)), strict=True)
    ]
    down = math.ceil(len(panels) / _ACROSS)
    told = (
        f"{', '.join(panels)} over {plural(len(records), 'record')}, a line per layer, pale for "
        "the first layers and strong for the last"
    )
    width = _WIDE * min(len(panels), _ACROSS)
    return alone(drawing(width, _HIGH * down, *drawn, title="Layers through training", told=told))


def _places(count: int) -> list[tuple[float, float]]:
    return [(_WIDE * (n % _ACROSS), _HIGH * (n // _ACROSS)) for n in range(count)]


def _panel(name: str, lines: Mapping[str, Sequence[tuple[Number, Number]]]) -> list[Markup]:
    left, right, top, bottom = 62.0, _WIDE - 16, 26.0, _HIGH - 34
    points = [point for line in lines.values() for point in line]
    x = axis([step for step, _ in points], left, right, log=False, room=0.0)
    y = axis([value for _, value in points], bottom, top, log=False)
    drawn = [
        label(left, 16, name, class_="strong fill-ink"),
        *frame(x, y, round_number, round_number),
    ]
    for place, (layer, line) in enumerate(lines.items()):
        step = _PALE + round((_STRONG - _PALE) * place / max(len(lines) - 1, 1))
        at = [(x.at(number), y.at(value)) for number, value in line]
        look = {"class_": f"stroke-cool-{step}", "stroke_width": 1.6, "stroke_linejoin": "round"}
        drawn.append(tag("g", tag("title", layer), path(at, **look)))
    return drawn
