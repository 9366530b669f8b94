"""The colours of drawings and pages, for light and dark, as CSS."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

STEPS = 9  # of a ramp
SERIES = 8
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif'


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
                ("#000000", "#ffffff"), key=lambda ink, ground=colour: contrast(ink, ground)
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
    return Markup(f"{text}{strong}{rules(LIGHT)}{dark}")


def variables() -> Markup:
    """The plain colours as CSS variables, for what is not drawn."""

    def declared(colours: Mapping[str, str]) -> str:
        plain = {name: colour for name, colour in colours.items() if "-" not in name}
        return "".join(f"--{name}:{colour};" for name, colour in plain.items())

    dark = f"@media (prefers-color-scheme:dark){{:root{{{declared(DARK)}}}}}"
    return Markup(f":root{{{declared(LIGHT)}}}{dark}")
