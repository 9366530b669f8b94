"""Make the page of a finished run or sweep again, from the JSON it left."""

from pathlib import Path
from typing import Any

from layerwise.core.errors import UserError
from layerwise.core.telling.outcome import Report, Sweep
from layerwise.core.written import parse_json
from layerwise.report.html import html

REPORT, SWEEP = "report.json", "sweep.json"
_MAKERS = f"`layerwise compress` writes {REPORT} into its output, `layerwise sweep` {SWEEP}."


def render(place: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run or sweep.

    Args:
        place: Its directory, or the JSON file itself.
        out: The page to write; None for one beside the JSON file, of its name.

    Returns:
        The page.

    Raises:
        UserError: There is no such run, its JSON is damaged, or the page is there already.
    """
    source = _source(Path(place))
    target = source.with_suffix(".html") if out is None else Path(out)
    outcome = read_outcome(source)
    if target.exists():
        raise UserError(
            f"{target} exists already, and nothing is ever overwritten.", "Choose another -o."
        )
    staged = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(html(outcome), encoding="utf-8")
        staged.rename(target)
    except OSError as error:
        raise UserError(
            f"{target} cannot be written: {error.strerror}.", "Choose another -o."
        ) from error
    return target


def read_outcome(file: Path) -> Report | Sweep:
    """What came of a run or of a sweep, as its JSON file keeps it.

    Raises:
        UserError: It is no such file.
    """
    try:
        content: Any = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}.", _MAKERS) from error
    if isinstance(content, dict) and "points" in content:
        return Sweep.from_json(content, str(file))
    if isinstance(content, dict) and "layers" in content:
        return Report.from_json(content, str(file))
    raise UserError(f"{file} is the report of no run and of no sweep.", _MAKERS)


def _source(place: Path) -> Path:
    if not place.is_dir():
        return place
    there = [place / name for name in (REPORT, SWEEP) if (place / name).exists()]
    if not there:
        raise UserError(f"{place} holds neither {REPORT} nor {SWEEP}.", _MAKERS)
    if len(there) > 1:
        raise UserError(f"{place} holds {REPORT} and {SWEEP}.", "Name the one you mean.")
    return there[0]
