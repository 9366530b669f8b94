"""Figures as people read them."""

import math

Number = int | float
NONE = "-"
TIMES = "\N{MULTIPLICATION SIGN}"
_UNITS = ("B", "kB", "MB", "GB", "TB")


def finite(value: Number | None) -> bool:
    """Whether there is a figure that can be shown or drawn."""
    return value is not None and math.isfinite(value)


def number(value: Number | None, digits: int = 3) -> str:
    """A figure to so many significant digits: 12,345; 0.0123; 1.20e-5."""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "infinite"
    if value == 0 or 10**digits <= abs(value) < 1e9:
        return f"{value:,.0f}"
    if not 1e-3 <= abs(value) < 1e9:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:#.{digits}g}".rstrip(".")


def round_number(value: Number) -> str:
    """A round figure, as an axis has it: 20; 0.01; 1e-5."""
    if not value or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.10g}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def size(value: Number | None) -> str:
    """Bytes, to three digits: 3.76 MB."""
    if value is None or not math.isfinite(value):
        return NONE
    place = 0
    while abs(value) >= 999.5 and place + 1 < len(_UNITS):
        value, place = value / 1000, place + 1
    digits = 0 if place == 0 or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {_UNITS[place]}"


def round_size(value: Number) -> str:
    """Bytes that are a round number of their unit: 5 MB."""
    digits, _, unit = size(value).partition(" ")
    return f"{float(digits):g} {unit}"


def percent(value: Number | None, digits: int = 3) -> str:
    """A share, to so many significant digits: 93.4%."""
    return NONE if value is None or not math.isfinite(value) else f"{number(100 * value, digits)}%"


def seconds(value: Number | None) -> str:
    """A time: 12.3 s, 4 min 10 s, 3 h 20 min."""
    if value is None or not math.isfinite(value):
        return NONE
    if value < 99.95:
        return f"{number(value)} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def plural(count: int, word: str) -> str:
    """A count with its noun: 1 layer, 300 layers."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"
