"""Tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from layerwise import export
from layerwise.core.catalogue import Method
from layerwise.core.merging.signatures import Signature
from layerwise.core.plan import Plan
from layerwise.core.reading.checkpoint import Source
from layerwise.core.reading.structure import Structure
from layerwise.core.telling.forecast import Forecast
from layerwise.core.telling.inspection import Inspection
from layerwise.core.telling.merged import Merge
from layerwise.core.telling.outcome import ByteVote, Report, Sweep
from layerwise.core.telling.rounds import Federation
from layerwise.report.answers import answers
from layerwise.report.figures import figure, share, windows_line

if TYPE_CHECKING:
    from layerwise.testing.claims import Verdict


# Figures of layers that stand side by side.
_COLUMNS = 8


def structure_table(source: Source, found: Structure, inspection: Inspection) -> Group:
    """The layers of a model with what was found out about them, and what is left alone."""
    table = _table(("layer", "left"), ("role", "left"), ("shape", "right"), ("MB", "right"))
    tables = [table, *_more_tables(found, list(inspection.shown.items())[_COLUMNS:])]
    first = dict(list(inspection.shown.items())[:_COLUMNS])
    for name in first:
        table.add_column(name, justify="right")
    for layer in found.layers.values():
        size = layer.count * source.tensors[layer.tensor].dtype.itemsize
        values = [_known(column.get(layer.name)) for column in first.values()]
        table.add_row(layer.name, layer.role, f"{layer.rows} x {layer.width}", _mb(size), *values)
    alone = _table(("left alone", "left"), ("MB", "right"), ("why", "left"))
    for reason, names in _by_reason(found).items():
        shown = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        alone.add_row(shown, _mb(sum(source.tensors[n].size for n in names)), _reason(reason))
    total = sum(info.size for info in source.tensors.values())
    planned = sum(layer.count for layer in found.layers.values())
    blocks = len([block for block in found.blocks if block])
    line = (
        f"{source.label}: {len(found.layers)} layers in {blocks} blocks, {planned:,} weights to "
        f"work on, {_mb(total)} MB in all"
    )
    about = [
        Text(f"{measure}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
        for measure, found in inspection.about.items()
    ]
    return Group(*tables, *about, alone, Text(line))


def _known(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _more_tables(
    found: Structure, columns: Sequence[tuple[str, Mapping[str, float]]]
) -> list[Table]:
    """Figures of layers for which one table has no room: figures are of no use when cut."""
    made: list[Table] = []
    for start in range(0, len(columns), _COLUMNS):
        part = columns[start : start + _COLUMNS]
        table = _table(("layer", "left"), *((name, "right") for name, _ in part))
        for layer in found.layers:
            table.add_row(layer, *(_known(column.get(layer)) for _, column in part))
        made.append(table)
    return made


def agreement_table(inspection: Inspection) -> Group:
    """How the measures and the truth agree, and what all of it says in words."""
    told = [Text(line) for line in answers(inspection)]
    if len(inspection.columns) < 2:
        return Group(*told)
    names = list(inspection.agreement)
    tables: list[Table] = []
    for start in range(0, len(names), _COLUMNS):
        part = names[start : start + _COLUMNS]
        table = _table(("rank correlation", "left"), *((name, "right") for name in part))
        for name, row in inspection.agreement.items():
            values = [row[other] for other in part]
            table.add_row(name, *(_dash(None) if v is None else f"{v:.2f}" for v in values))
        tables.append(table)
    return Group(*tables, *told)


def structure_json(source: Source, found: Structure, inspection: Inspection) -> dict[str, Any]:
    """The same as JSON, with a record for each layer."""
    columns = inspection.shown
    layers = [
        {
            "layer": layer.name,
            "tensor": layer.tensor,
            "block": layer.block,
            "role": layer.role,
            "rows": layer.rows,
            "width": layer.width,
            "bytes": layer.count * source.tensors[layer.tensor].dtype.itemsize,
            "reads_with": layer.reads,
            "fused_with": layer.fused,
            **{name: column.get(layer.name) for name, column in columns.items()},
        }
        for layer in found.layers.values()
    ]
    made: dict[str, Any] = {"model": source.label, "layers": layers, "left": dict(found.left)}
    if truth := inspection.truth:
        told = {"done": truth.done, "text": truth.text, "windows": truth.windows}
        made["truth"] = told
    if columns:
        made["agreement"] = {name: dict(row) for name, row in inspection.agreement.items()}
        made["about"] = {name: dict(told) for name, told in inspection.about.items()}
        made["left_out"] = dict(inspection.left_out)
        made["answers"] = answers(inspection)
    return made


def plan_table(source: Source, found: Structure, plan: Plan) -> Group:
    """What a plan gives to each layer."""
    table = _table(
        ("layer", "left"),
        ("bits", "right"),
        ("stored", "right"),
        ("method", "left"),
        ("density", "right"),
        ("rank", "right"),
        ("why", "left"),
    )
    format = export.get(plan.format, source, plan.options)
    stored = count = 0
    for name, layer_plan in plan.layers.items():
        layer = found.layers[name]
        size = format.size(layer, layer_plan, source.tensors[layer.tensor])
        stored, count = stored + size, count + layer.count
        method = " + ".join(id.partition("/")[2] for id, _ in layer_plan.steps) or "none"
        table.add_row(
            name,
            _dash(layer_plan.bits),
            f"{8 * size / layer.count:.3f}",
            method,
            f"{layer_plan.density:.2f}",
            _dash(layer_plan.rank or None),
            _reason(layer_plan.why),
        )
    return Group(table, Text(f"{8 * stored / count:.3f} bits stored per weight on average"))


def forecast_line(foreseen: Forecast) -> Text:
    """What carrying out a plan will take."""
    return Text(foreseen.words())


def layer_table(report: Report) -> Table:
    """One row per layer of a finished run."""
    table = _table(
        ("layer", "left"),
        ("KB before", "right"),
        ("KB after", "right"),
        ("bits", "right"),
        ("density", "right"),
        ("rank", "right"),
        ("error", "right"),
        ("score", "right"),
        ("method", "left"),
        ("why", "left"),
    )
    for row in report.layers:
        why = "; ".join(part for part in (row.why, *row.notes) if part)
        table.add_row(
            row.layer,
            f"{row.bytes_before / 1e3:.1f}",
            f"{row.bytes_after / 1e3:.1f}",
            _dash(row.bits),
            f"{row.density:.2f}",
            _dash(row.rank or None),
            f"{row.error:.3%}",
            "-" if row.score is None else f"{row.score:.3g}",
            row.method,
            _reason(why),
        )
    return table


def summary(report: Report) -> Group:
    """The outcome of a run in a few lines."""
    table = _table(("", "left"), ("before", "right"), ("after", "right"))
    table.add_row("weight files, MB", _mb(report.bytes_before), _mb(report.bytes_after))
    table.add_row("bits per planned weight", _dtype_bits(report), f"{report.average_bits:.3f}")
    if seen := report.comparison:
        table.add_row(
            "perplexity",
            figure(seen.perplexity_before, seen.perplexity_before_error),
            figure(seen.perplexity, seen.perplexity_error),
        )
        table.add_row("KL to the original, nats", "", figure(seen.kl, seen.kl_error))
        table.add_row("top-1 agreement", "", share(seen.top1, seen.top1_error))
    if floor := report.noise_floor:
        table.add_row("KL of the original in bfloat16", figure(floor.kl, floor.kl_error), "")
    if told := report.prediction:
        table.add_row("the plan foresaw", "", _number(told.predicted))
        table.add_row(
            f"rank correlation over {told.layers} layers ({told.sensitivity})",
            "",
            _number(told.rank_correlation),
        )
    foreseen = report.forecast
    table.add_row(
        "seconds (forecast, measured)",
        f"about {foreseen['seconds']:.0f}",
        f"{report.work_seconds:.1f}",
    )
    table.add_row(
        "peak MB (forecast, measured)", _mb(foreseen["peak_bytes"]), _mb(report.peak_bytes)
    )
    table.add_row(
        "disk MB (forecast, measured)", _mb(foreseen["disk_bytes"]), _mb(report.disk_bytes)
    )
    lines = [Text(f"{report.model} -> {report.out} ({report.format})")]
    if seen := report.comparison:
        lines.append(windows_line(seen))
    if proof := report.proof:
        lines.append(
            Text(
                f"proven: loaded back by {proof.loader}, logits of {proof.tokens:,} tokens differ "
                f"by at most {proof.largest_difference:.2g} (allowed {proof.allowed:.2g})"
            )
        )
    return Group(table, *lines, *(Text(f"note: {note}") for note in report.notes))


def sweep_table(sweep: Sweep) -> Group:
    """One row per point, smallest first; those that no other beats are marked."""
    table = _table(
        ("", "left"),
        ("method", "left"),
        ("budget", "left"),
        ("bits", "right"),
        ("MB", "right"),
        ("KL", "right"),
        ("perplexity", "right"),
        ("top-1", "right"),
        ("seconds", "right"),
    )
    for point in sorted(sweep.points, key=lambda one: (one.bytes, one.kl or 0.0)):
        table.add_row(
            "*" if point.front else "",
            point.method,
            point.budget,
            f"{point.bits:.3f}",
            _mb(point.bytes),
            _number(point.kl),
            _number(point.perplexity),
            "-" if point.top1 is None else f"{point.top1:.2%}",
            f"{point.seconds:.1f}",
        )
    lines = [
        f"{sweep.model}, compared on {sweep.text}; * is beaten by no other point",
        *(f"note: {note}" for note in sweep.notes),
    ]
    return Group(table, *(Text(line) for line in lines))


def byte_vote(seen: ByteVote) -> Group:
    """Bits per byte and continuations of each model, and of all together."""
    table = _table(
        ("model", "left"), ("weight", "right"), ("bits/byte", "right"), ("goes on", "left")
    )
    costs = [*seen.bits, seen.bits_together] if seen.bits else [None] * (len(seen.models) + 1)
    names = [*seen.models, "together"]
    shares = [*(f"{weight:.3f}" for weight in seen.weights), ""]
    told = [*seen.continuations, seen.continuation] if seen.prompt else [""] * len(names)
    for name, share_of, cost, text in zip(names, shares, costs, told, strict=True):
        table.add_row(name, share_of, _number(cost), repr(text) if seen.prompt else "")
    lines: list[str] = []
    if seen.text and seen.gained is not None:
        error = "" if seen.gained_error is None else f" ± {seen.gained_error:.4f}"
        lines.append(
            f"{seen.bytes} bytes of {seen.text}; together {seen.gained:.4f}{error} bits per byte "
            "below the best of them"
        )
    return Group(table, *(Text(line) for line in lines))


def federation_table(done: Federation) -> Group:
    """One row per round, and what came of them."""
    table = _table(
        ("round", "right"),
        ("clients", "right"),
        ("accuracy", "right"),
        ("loss", "right"),
        ("their loss", "right"),
        ("left out", "left"),
    )
    for row in done.rounds:
        table.add_row(
            str(row.round),
            str(len(row.clients)),
            f"{row.accuracy:.2%}",
            _number(row.loss),
            _number(row.local_loss),
            "; ".join(f"client {client} {why}" for client, why in row.excluded.items()),
        )
    idle = sum(not count for count in done.counts)
    lines = [
        f"{done.study}, {done.method}: accuracy {done.accuracy:.2%} over the last rounds",
        f"samples of each client: {', '.join(map(str, done.counts))}"
        + f"; {idle} have none and are never asked" * bool(idle),
        *(f"note: {note}" for note in done.notes),
        *([f"the model: {done.out}"] if done.out else []),
    ]
    return Group(table, *(Text(line) for line in lines))


def methods_table(methods: Sequence[Method]) -> Table:
    """One row per method."""
    table = _table(("method", "left"), ("needs", "left"), ("what it does", "left"))
    for method in methods:
        table.add_row(method.id, method.needs, method.summary)
    return table


def claims_table(verdicts: Sequence["Verdict"]) -> Table:
    """One row per claim."""
    table = _table(
        ("method", "left"),
        ("against", "left"),
        ("bench", "left"),
        ("options", "left"),
        ("loss", "right"),
        ("baseline", "right"),
        ("margin", "right"),
        ("verdict", "left"),
    )
    for verdict in verdicts:
        table.add_row(
            verdict.method,
            verdict.beats,
            verdict.bench,
            verdict.options,
            _number(verdict.loss),
            _number(verdict.baseline),
            f"{verdict.margin:.0%}",
            verdict.verdict,
        )
    return table


def signature_table(found: Signature) -> Group:
    """How far apart the two models of a signature are, layer by layer, and what it holds."""
    table = _table(("layer", "left"), ("apart", "right"), ("kept", "left"))
    for layer, apart in found.apart.items():
        kept = any(name.startswith(f"{layer}.") or name == layer for name in found.tensors)
        table.add_row(layer, _number(apart), "yes" if kept else "")
    numbers = sum(one.numel() for one in found.tensors.values())
    bits = f", {found.bits} bits each" if found.bits else ""
    return Group(
        table, Text(f"{numbers} numbers{bits}: {found.size} bytes in {found.label or 'memory'}")
    )


def merge_table(done: Merge) -> Group:
    """How far every tensor of a merge is from its parents', and how good each model is."""
    letters = [chr(ord("A") + n) if n < 26 else str(n) for n in range(len(done.models))]
    named = [f"{letter}: {label}" for letter, label in zip(letters, done.models, strict=True)]
    heads = [(f"to {letter}", "right") for letter in letters]
    base = [("to base", "right")] if done.base else []
    table = _table(
        ("tensor", "left"),
        ("shape", "right"),
        ("weights", "right"),
        *heads,
        *base,
        ("note", "left"),
    )
    for row in done.rows:
        distances = [_number(one) for one in row.distances]
        table.add_row(
            row.tensor,
            " x ".join(map(str, row.shape)),
            " ".join(f"{share:.3g}" for share in row.shares) or "-",
            *distances,
            *([_number(row.from_base)] if done.base else []),
            _reason(row.note),
        )
    parts: list[Any] = [table]
    if done.scores:
        texts = list(dict.fromkeys(one.text for one in done.scores))
        scored = _table(("loss in nats per token", "left"), *((text, "right") for text in texts))
        found = {(one.model, one.text): one.loss for one in done.scores}
        for model in dict.fromkeys(one.model for one in done.scores):
            scored.add_row(model, *(_number(found.get((model, text))) for text in texts))
        parts.append(scored)
    if done.barriers:
        ways = _table(
            ("between", "left"),
            ("and", "left"),
            ("text", "left"),
            ("barrier", "right"),
            ("at", "right"),
        )
        for one in done.barriers:
            ways.add_row(one.first, one.second, one.text, _number(one.height), f"{one.at:.2f}")
        parts.append(ways)
    if (fit := done.fit) is not None:
        parts.append(
            Text(
                f"weights found in {fit.evaluations} trials on {fit.text}: loss {fit.loss:.4f}, "
                f"{fit.uniform_loss:.4f} with the best weights that are the same everywhere; on "
                f"the half kept aside {fit.unseen_loss:.4f} and {fit.unseen_uniform_loss:.4f}"
            )
        )
    parts += [Text(note) for note in done.notes]
    line = (
        f"{done.out}: {len(done.rows)} tensors by {done.method}, {done.dtype}, "
        f"{_mb(done.bytes)} MB, {done.seconds:.1f} s; {'; '.join(named)}"
        + (f"; base: {done.base}" if done.base else "")
    )
    return Group(*parts, Text(line))


def _table(*columns: tuple[str, Any]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, justify in columns:
        # On a narrow terminal words give way: figures and names are of no use when cut.
        words = name == columns[-1][0] and justify == "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=not words)
    return table


def _reason(text: str) -> Text:
    """Cut where the terminal ends; plans and reports hold it whole."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def _by_reason(found: Structure) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in found.left.items():
        grouped.setdefault(reason, []).append(name)
    return grouped


def _dtype_bits(report: Report) -> str:
    before = sum(row.bytes_before for row in report.layers)
    count = sum(row.rows * row.width for row in report.layers)
    return f"{8 * before / count:.3f}"


def _mb(size: int | float) -> str:
    return f"{size / 1e6:.2f}"


def _dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
