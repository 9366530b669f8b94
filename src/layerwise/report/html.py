"""One self-contained HTML file per run or sweep: it fetches nothing and can be read without script.

What the page says is gathered here; how it is laid out stands in `report.html.jinja`, how it looks
in `report.css`.
"""

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import yaml
from markupsafe import Markup

from layerwise.core.telling.outcome import Comparison, LayerRow, Report, Sweep, SweepPoint
from layerwise.report import layer_plots, plots
from layerwise.report._colours import STEPS, style, variables
from layerwise.report._page import Bar, Block, Card, Cell, Column, Page, Table
from layerwise.report._words import (
    NONE,
    TIMES,
    Number,
    finite,
    number,
    percent,
    plural,
    seconds,
    size,
)

Item = TypeVar("Item")

_HERE = Path(__file__).parent
# Beyond so many layers the bars are folded away under a picture of the blocks.
_OPEN_LAYERS = 60
# A block with more layers than this (experts) shows them by role.
_BLOCK_LAYERS = 16


def html(outcome: Report | Sweep) -> str:
    """The page of a run or of a sweep.

    Args:
        outcome: What came of it.
    """
    page = _report_page(outcome) if isinstance(outcome, Report) else _sweep_page(outcome)
    script = (_HERE / "report.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = _environment().get_template("report.html.jinja")
    return template.render(
        page=page,
        style=variables() + style() + Markup((_HERE / "report.css").read_text()),
        script=Markup(script),
        # The page's own script may run, and nothing else may be run or fetched.
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    )


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


# A run


def _report_page(report: Report) -> Page:
    rows = report.layers
    many = len(rows) > _OPEN_LAYERS
    colours = _widths(rows)
    scatter = layer_plots.kl_scatter(rows)
    return Page(
        title=f"{_name(report.model)}: {report.average_bits:.2f} bits per weight",
        model=report.model,
        kind="compression report",
        lede=_lede(report),
        cards=_cards(report),
        notes=report.notes,
        environment=list(report.environment.items()),
        recipe=_yaml(report.recipe),
        overview=layer_plots.block_columns(rows) if many else None,
        blocks=_blocks(rows, colours),
        folded=many,
        key=[(_width(bits), colour) for bits, colour in colours.items()],
        curves=layer_plots.error_curves(rows),
        maps=_maps(rows),
        forecast=_forecast(report),
        scatter=scatter,
        scatter_note=_scatter_note(report, scatter is not None),
        decisions=_decisions(rows),
        left=_left(report.left),
    )


def _name(model: str) -> str:
    """The last part of a path or of a hub id."""
    return model.rstrip("/").rpartition("/")[2] or model


def _lede(report: Report) -> str:
    methods = sorted({row.method for row in report.layers} - {"none"})
    made = (
        f"{plural(len(report.layers), 'layer')} by {', '.join(methods)}"
        if methods
        else (f"{plural(len(report.layers), 'layer')} left as they were")
    )
    shrunk = f"{size(report.bytes_before)} of weights became {size(report.bytes_after)}"
    return f"{shrunk} in the {report.format} format: {made}. The result is in {report.out}."


def _cards(report: Report) -> list[Card]:
    share = report.bytes_after / max(report.bytes_before, 1)
    before = sum(row.bytes_before for row in report.layers)
    weights = max(sum(row.rows * row.width for row in report.layers), 1)
    cards = [
        Card(
            "Weight files",
            size(report.bytes_after),
            [f"{size(report.bytes_before)} before", _times(share)],
            share=min(100 * share, 100),
        ),
        Card(
            "Stored bits per planned weight",
            f"{report.average_bits:.3f}",
            [f"{8 * before / weights:.4g} before", "scales, zero points, masks, factors counted"],
            share=min(100 * report.average_bits * weights / max(8 * before, 1), 100),
        ),
    ]
    if report.comparison:
        cards += _quality_cards(report, report.comparison)
    if proof := report.proof:
        largest = f"largest difference of a logit {number(proof.largest_difference, 2)}"
        cards.append(
            Card(
                "Proof",
                "Proven",
                [
                    f"loaded back by {proof.loader}",
                    f"{largest}, {number(proof.allowed, 2)} allowed, {proof.tokens:,} tokens",
                ],
                good=True,
            )
        )
    return cards


def _times(share: Number) -> str:
    if share <= 0:
        return "nothing is left"
    return f"{1 / share:.2f} times smaller" if share < 0.995 else f"{100 * share:.0f}% of it"


def _quality_cards(report: Report, seen: Comparison) -> list[Card]:
    floor, cards = report.noise_floor, list[Card]()
    if seen.kl is not None:
        noise = floor.kl if floor else None
        foreseen = report.prediction.predicted if report.prediction else None
        notes = [f"self-noise floor {number(noise)}"] if finite(noise) else []
        picture = plots.quality_strip(seen.kl, noise, foreseen)
        cards.append(Card("KL to the original, nats", number(seen.kl), notes, picture=picture))
    words = [f"{seen.tokens:,} tokens of {seen.text}"]
    if seen.perplexity_before:
        change = seen.perplexity / seen.perplexity_before - 1
        sign = "+" if change > 0 else ""
        words.insert(0, f"{number(seen.perplexity_before, 4)} before ({sign}{percent(change)})")
    cards.append(Card("Perplexity", number(seen.perplexity, 4), words))
    if seen.top1 is not None:
        notes = ["tokens whose likeliest successor is the same"]
        if floor and floor.top1 is not None:
            notes.append(f"{percent(floor.top1, 4)} for the original against itself")
        share = min(max(100 * seen.top1, 0), 100) if finite(seen.top1) else None
        cards.append(Card("Top-1 agreement", percent(seen.top1), notes, share=share))
    return cards


def _widths(rows: Sequence[LayerRow]) -> dict[int | None, str]:
    """The colour of each width, more bits darker; what keeps its dtype is grey."""
    found = sorted({row.bits for row in rows if row.bits is not None})
    last = max(len(found) - 1, 1)
    steps = {bits: 2 + round((STEPS - 3) * place / last) for place, bits in enumerate(found)}
    colours: dict[int | None, str] = {bits: f"cool-{step}" for bits, step in steps.items()}
    return colours | ({None: "kept"} if any(row.bits is None for row in rows) else {})


def _width(bits: int | None) -> str:
    return "as stored" if bits is None else plural(bits, "bit")


def _blocks(rows: Sequence[LayerRow], colours: Mapping[int | None, str]) -> list[Block]:
    grouped = {name: _bundles(held) for name, held in layer_plots.blocks(rows).items()}
    bundles = [held for block in grouped.values() for _, held in block]
    most = max((max(_before(held), _after(held)) for held in bundles), default=0) or 1
    made: list[Block] = []
    for name, block in grouped.items():
        held = [row for _, bundle in block for row in bundle]
        total = f"{size(_before(held))} → {size(_after(held))}"
        bars = [_bar(word, bundle, most, colours) for word, bundle in block]
        made.append(Block(name or "outside the blocks", total, bars))
    return made


def _bundles(rows: Sequence[LayerRow]) -> list[tuple[str, list[LayerRow]]]:
    """The layers of a block with the names they have in it; many of them by role."""
    if len(rows) > _BLOCK_LAYERS:
        grouped = layer_plots.roles(rows)
        return [(f"{role} {TIMES} {len(held)}", held) for role, held in grouped.items()]
    return [(row.layer.removeprefix(f"{row.block}."), [row]) for row in rows]


def _before(rows: Sequence[LayerRow]) -> int:
    return sum(row.bytes_before for row in rows)


def _after(rows: Sequence[LayerRow]) -> int:
    return sum(row.bytes_after for row in rows)


def _bar(name: str, rows: Sequence[LayerRow], most: int, colours: Mapping[int | None, str]) -> Bar:
    before, after = _before(rows), _after(rows)
    widest = max(rows, key=lambda row: -1 if row.bits is None else row.bits)
    return Bar(
        name=name,
        before=100 * before / most,
        after=100 * after / most,
        colour=colours[widest.bits],
        sizes=f"{size(before)} → {size(after)}",
        got=", ".join(dict.fromkeys(_got(row) for row in rows)),
    )


def _got(row: LayerRow) -> str:
    """What a layer got, in a few words."""
    parts = [_width(row.bits)]
    parts += [f"{100 * row.density:.3g}% kept"] if finite(row.density) and row.density < 1 else []
    parts += [f"rank {row.rank}"] if row.rank else []
    return " · ".join(parts)


def _maps(rows: Sequence[LayerRow]) -> list[tuple[str, Markup]]:
    scales = (
        layer_plots.Scale("stored bits", lambda row: row.stored_bits, "cool", _bits),
        layer_plots.Scale("error", lambda row: row.error, "warm", lambda v: percent(v, 2)),
        layer_plots.Scale("score", lambda row: row.score, "leaf", lambda v: number(v, 2)),
        layer_plots.Scale("measured KL", lambda r: r.measured_kl, "warm", lambda v: number(v, 2)),
    )
    if len(rows) < 2:
        return []
    drawn = ((scale.name, layer_plots.heat_map(rows, scale)) for scale in scales)
    return [(name, picture) for name, picture in drawn if picture is not None]


def _bits(value: Number) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _forecast(report: Report) -> Table | None:
    foreseen = report.forecast
    measured = (
        ("size_bytes", "weight files", report.bytes_after, size),
        ("peak_bytes", "peak memory", report.peak_bytes, size),
        ("disk_bytes", "most disk", report.disk_bytes, size),
        ("seconds", "time after the plan was made", report.work_seconds, seconds),
    )
    rows = [
        [Cell(name), Cell(write(foreseen[key])), Cell(write(found)), _ratio(foreseen[key], found)]
        for key, name, found, write in measured
        if key in foreseen
    ]
    if (made := report.prediction) and made.predicted is not None:
        name = f"KL of the whole model, nats (layers weighted by {made.sensitivity})"
        predicted, found = made.predicted, made.measured
        rows.append(
            [Cell(name), Cell(number(predicted)), Cell(number(found)), _ratio(predicted, found)]
        )
    heads = ("", "foreseen", "measured", "measured / foreseen")
    columns = [Column(head, kind="number" if head else "text") for head in heads]
    return Table("What was foreseen, and what came", columns, rows) if rows else None


def _ratio(foreseen: Number, found: Number) -> Cell:
    return Cell(f"{found / foreseen:.2f}" if foreseen and finite(found / foreseen) else NONE)


def _scatter_note(report: Report, drawn: bool) -> str:
    made = report.prediction
    if made is None or made.rank_correlation is None:
        return ""
    words = f"rank correlation {made.rank_correlation:.3f} over {plural(made.layers, 'layer')}"
    below = [r for r in report.layers if r.measured_kl is not None and r.measured_kl <= 0]
    if drawn and below:
        words += f"; {plural(len(below), 'layer')} at zero or below cannot be drawn"
    return words


def _decisions(rows: Sequence[LayerRow]) -> Table | None:
    """Every layer with what it got and why; columns in which nothing stands are left out."""
    columns: list[tuple[Column, Callable[[LayerRow], Cell]]] = [
        (Column("layer", kind="code"), lambda r: Cell(r.layer)),
        (Column("bits", "width of a code"), lambda r: _optional(r.bits, str)),
        (Column("density", "share of weights kept"), lambda r: _some(r.density, 1, percent)),
        (Column("rank", "columns of the correction"), lambda r: _some(r.rank, 0, str)),
        (Column("before"), lambda r: Cell(size(r.bytes_before), r.bytes_before)),
        (Column("after"), lambda r: Cell(size(r.bytes_after), r.bytes_after)),
        (Column("stored", "bits per weight"), lambda r: _optional(r.stored_bits, _two)),
        (Column("error", "relative, of the output"), lambda r: _optional(r.error, percent)),
        (Column("score", "sensitivity, for the plan"), lambda r: _optional(r.score, number)),
        (Column("why", kind="words"), lambda r: Cell("; ".join(p for p in (r.why, *r.notes) if p))),
        (Column("predicted KL", "nats"), lambda r: _optional(r.predicted_kl, number)),
        (Column("measured KL", "nats"), lambda r: _optional(r.measured_kl, number)),
        (Column("method", kind="text"), lambda r: Cell(r.method)),
        (Column("shape", f"outputs {TIMES} inputs"), lambda r: Cell(_shape(r), r.rows * r.width)),
    ]
    return _table("Layers", columns, rows) if rows else None


def _table(
    caption: str, columns: Sequence[tuple[Column, Callable[[Item], Cell]]], items: Sequence[Item]
) -> Table:
    cells = [[make(item) for item in items] for _, make in columns]
    kept = [n for n, made in enumerate(cells) if any(cell.text not in ("", NONE) for cell in made)]
    heads = [columns[n][0] for n in kept]
    return Table(caption, heads, [[cells[n][i] for n in kept] for i in range(len(items))], True)


def _shape(row: LayerRow) -> str:
    return f"{row.rows:,} {TIMES} {row.width:,}"


def _two(value: Number) -> str:
    return f"{value:.2f}"


def _four(value: Number) -> str:
    return number(value, 4)


def _three(value: Number) -> str:
    return f"{value:.3f}"


def _optional(value: Any, write: Any) -> Cell:
    return Cell(write(value), value) if finite(value) else Cell(NONE)


def _some(value: Any, nothing: Any, write: Any) -> Cell:
    return Cell(NONE, value) if value == nothing else _optional(value, write)


def _left(left: Mapping[str, str]) -> Table | None:
    grouped: dict[str, list[str]] = {}
    for name, reason in left.items():
        grouped.setdefault(reason, []).append(name)
    rows = [
        [Cell(reason), Cell(f"{len(names):,}", len(names)), Cell(_some_names(names))]
        for reason, names in grouped.items()
    ]
    columns = [Column("why", kind="text"), Column("tensors"), Column("which", kind="code")]
    return Table("Tensors left alone", columns, rows) if rows else None


def _some_names(names: Sequence[str]) -> str:
    """The first few: a norm of every block says nothing new."""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# A sweep


def _sweep_page(sweep: Sweep) -> Page:
    seen = [p for p in sweep.points if finite(p.kl) or finite(p.perplexity)]
    drawn = [
        ("wide", plots.pareto(sweep, width=860)),
        ("narrow", plots.pareto(sweep, width=400)),
    ]
    methods = list(dict.fromkeys(point.method for point in sweep.points))
    return Page(
        title=f"{_name(sweep.model)}: sweep of {plural(len(sweep.points), 'point')}",
        model=sweep.model,
        kind="sweep report",
        lede=f"{plural(len(sweep.points), 'model')} made from one: {', '.join(methods)}.",
        cards=_sweep_cards(sweep),
        notes=sweep.notes,
        environment=list(sweep.environment.items()),
        recipe=_yaml(sweep.recipe),
        pareto=drawn if seen else (),
        points=_points(sweep.points),
    )


def _sweep_cards(sweep: Sweep) -> list[Card]:
    front = [point for point in sweep.points if point.front]
    methods = list(dict.fromkeys(point.method for point in front))
    cards = [Card("Points", f"{len(sweep.points):,}", _tried(sweep))]
    if front:
        cards.append(Card("On the Pareto front", f"{len(front):,}", [", ".join(methods)]))
    if sweep.bytes_before:
        least = min((point.bytes for point in sweep.points), default=0)
        notes = [f"smallest point {size(least)}"] if least else []
        cards.append(Card("Weight files of the original", size(sweep.bytes_before), notes))
    if before := sweep.original:
        notes = [f"{before.tokens:,} tokens of {before.text}"]
        cards.append(Card("Perplexity of the original", number(before.perplexity, 4), notes))
    if (floor := sweep.noise_floor) and floor.kl is not None:
        notes = ["the original against itself in a narrower dtype"]
        cards.append(Card("Self-noise floor, nats", number(floor.kl), notes))
    return cards


def _tried(sweep: Sweep) -> list[str]:
    methods = len({point.method for point in sweep.points})
    budgets = len({point.budget for point in sweep.points})
    words = [f"{plural(methods, 'method')}, {plural(budgets, 'budget')}"]
    return [*words, f"in {seconds(sweep.seconds)}"] if sweep.seconds else words


def _points(points: Sequence[SweepPoint]) -> Table | None:
    columns: list[tuple[Column, Callable[[SweepPoint], Cell]]] = [
        (Column("method", kind="text"), lambda p: Cell(p.method)),
        (Column("budget", kind="text"), lambda p: Cell(p.budget)),
        (Column("front", "none is both smaller and better", "text"), lambda p: _front(p.front)),
        (Column("bits", "stored per planned weight"), lambda p: _optional(p.bits, _three)),
        (Column("weight files"), lambda p: Cell(size(p.bytes), p.bytes)),
        (Column("KL", "to the original, nats"), lambda p: _optional(p.kl, number)),
        (Column("perplexity"), lambda p: _optional(p.perplexity, _four)),
        (Column("top-1", "agreement with the original"), lambda p: _optional(p.top1, percent)),
        (Column("time"), lambda p: _optional(p.seconds, seconds)),
        (Column("where", kind="code"), lambda p: Cell(p.out or NONE)),
    ]
    return _table("Points", columns, points) if points else None


def _front(held: bool) -> Cell:
    return Cell("front" if held else NONE, int(held))


def _yaml(recipe: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True) if recipe else ""
