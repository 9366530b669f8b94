"""Look at a model's layers: measures, what each layer brings alone, and how all these agree."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from layerwise.core import catalogue
from layerwise.core.economy import LAVISH
from layerwise.core.errors import UserError
from layerwise.core.keeping.cache import Cache
from layerwise.core.plan import LayerPlan
from layerwise.core.progress import Progress
from layerwise.core.reading.checkpoint import Source
from layerwise.core.reading.structure import Structure
from layerwise.core.reading.text import Windows
from layerwise.core.running.carried import shelf
from layerwise.core.telling.inspection import Inspection, Truth
from layerwise.flow.agreeing import agreement
from layerwise.flow.identity import candidates_of
from layerwise.flow.market import check_level, label
from layerwise.flow.pairing import PATH_TOKENS, POINTS, check_pair
from layerwise.flow.preparing import Prepared, Texts, calibration_text, check_loss, prepare
from layerwise.flow.probing import Probe
from layerwise.flow.survey import Survey, everywhere, running_in_blocks, survey
from layerwise.flow.wish import Wish

ALL = "all"
# The width that measures of what a width makes of a layer see if none is asked for.
_USUAL_BITS = 4
# The measure that is also found at several widths at once.
_ERROR = "error"
# Activations of all layers' windows beyond so many bytes lie on disk.
_IN_MEMORY = 1 << 30


@dataclass(frozen=True, slots=True)
class Looking:
    """What is to be found out.

    Attributes:
        measures: Names of measures; `ALL` alone for those that the model and the texts allow.
        widths: Widths to try on every layer; those that compare see the first.
        truth: Whether the KL is measured that each layer brings when it alone becomes what the
            first width, and the wish's density and rank, make of it.
    """

    measures: Sequence[str]
    widths: Sequence[int] = ()
    truth: bool = False


def look(
    source: Source,
    found: Structure,
    asked: Looking,
    wish: Wish,
    texts: Texts,
    cache: Cache,
    progress: Progress,
    base: Source | None = None,
    **where: Any,
) -> Inspection:
    """Find out what is asked for; nothing is written but to the cache.

    Args:
        source: The model.
        found: Its structure.
        asked: What is to be found out.
        wish: How a level is made.
        texts: What is read, and how much of it.
        cache: Where results of levels are kept.
        progress: Is told of each block.
        base: Another model of the same layers, for measures that compare with it.
        where: Where the block at work is put, and whether a checkpoint's own Python may run.

    Raises:
        UserError: A measure that was named, or the truth, cannot be had of this model.
    """
    wanted = wish.fitted(found)
    every = list(asked.measures) == [ALL]
    methods, left_out = _allowed(source, texts, base) if every else (_named(asked.measures), {})
    pairs = {word for method in methods for word in catalogue.PAIRED & set(method.evidence)}
    # Only what looks at layers of both asks that both have the same.
    if base is not None and pairs - catalogue.UNLIKE:
        check_pair(source, base, found)
    levels = _levels(methods, asked, wanted)
    steps = [catalogue.get(id) for level in levels for id, _ in level.steps]
    proof = "auto" if asked.truth else "none"
    try:
        prepared = prepare(source, found, [*methods, *steps], texts, proof=proof, **where)
    except UserError as error:
        if not every or not any(method.calibrated for method in methods):
            raise
        # What keeps the model from reading a text keeps no one from its weights.
        left_out |= {m.name: error.problem for m in methods if m.calibrated}
        methods = [method for method in methods if not method.calibrated]
        prepared = prepare(source, found, [*methods, *steps], texts, proof=proof, **where)
    if every:
        methods, more = _running(prepared, methods)
        left_out |= more
    for level in levels:
        check_level(prepared, wanted, level)
    even = [everywhere(level, found, source, wanted.options) for level in levels]
    candidates = candidates_of(prepared, cache)
    seen = survey(
        prepared,
        {name: [plans[name] for plans in even] for name in found.layers},
        options=wanted.options,
        measures=methods,
        base=base,
        lenient=every,
        candidates=candidates,
        economy=replace(LAVISH, on_disk=_large(prepared, methods)),
        progress=progress,
    )
    left_out |= seen.refused
    columns = _columns(seen, asked.widths)
    if every:
        alike = {name for name, column in columns.items() if len(set(column.values())) < 2}
        for name in sorted(alike):
            value = next(iter(columns.pop(name).values()))
            left_out[name] = f"it says {value:g} of every layer"
    truth = None
    if asked.truth:
        windows = _to_compare(prepared)
        with shelf(_large(prepared, ()), cache.folder) as kept:
            probe = Probe(prepared, wanted.format, wanted.options, candidates, windows.ids, kept)
            kl = probe.apart(even[0], progress)
        truth = Truth(kl, _told(levels[0]), windows.label, len(windows.ids))
    details = {
        name: found
        for name, found in seen.columns.items()
        if name not in seen.scores and name.partition(".")[0] in columns
    }
    made = Inspection(source.label, columns, details, seen.about, left_out, truth)
    return replace(made, agreement=agreement(made.columns))


def _to_compare(prepared: Prepared) -> Windows:
    if prepared.heldout is None:
        raise UserError(
            f"{prepared.source.label} does not answer a text with logits, so no KL can be had.",
            "Leave --truth out, or give a module in memory and tensors to run it on.",
        )
    return prepared.heldout


def _named(names: Sequence[str]) -> list[catalogue.Method]:
    return [catalogue.get(f"measure/{name}") for name in names]


def _allowed(
    source: Source, texts: Texts, base: Source | None
) -> tuple[list[catalogue.Method], dict[str, str]]:
    """The measures that a model and texts allow, and why the others do not."""
    left_out: dict[str, str] = {}
    kept: list[catalogue.Method] = []
    for method in catalogue.methods("measure"):
        if reason := _refusal(method, source, texts, base):
            left_out[method.name] = reason
        else:
            kept.append(method)
    return kept, left_out


def _refusal(method: catalogue.Method, source: Source, texts: Texts, base: Source | None) -> str:
    """Why a measure cannot be had; "" if it can, as far as is known before the model runs."""
    if catalogue.LONG.intersection(method.evidence):
        return "it runs the whole model many times; ask for it by name"
    if base is None and catalogue.PAIRED.intersection(method.evidence):
        return "it compares with another model, and none was given (--against BASE)"
    if method.calibrated and calibration_text(source, texts) is None:
        return "it reads a calibration text, and none was given (--calibration TEXT)"
    if method.labelled and texts.labels is None:
        return "it reads texts of known classes, and none were given (--labels FILE)"
    try:
        check_loss(source, [method])
    except UserError as error:
        return error.problem
    return ""


def _running(
    prepared: Prepared, methods: Sequence[catalogue.Method]
) -> tuple[list[catalogue.Method], dict[str, str]]:
    """The measures that a model allows as it runs, and why the others do not."""
    refused = {m.name: problem for m in methods if (problem := running_in_blocks(prepared, m))}
    return [method for method in methods if method.name not in refused], refused


def _levels(methods: Sequence[catalogue.Method], asked: Looking, wish: Wish) -> list[LayerPlan]:
    """What is tried on every layer: widths, or what the wish says without one."""
    comparing = any("approximation" in method.evidence for method in methods)
    if not comparing and not asked.truth:
        return []
    if asked.widths:
        return [wish.level(bits) for bits in asked.widths]
    changed = wish.density < 1 or wish.rank > 0
    return [wish.level(None if changed else _USUAL_BITS)]


def _columns(seen: Survey, widths: Sequence[int]) -> dict[str, dict[str, float]]:
    """Scores by measure; the output error at each of several widths is a column of its own."""
    columns: dict[str, dict[str, float]] = {}
    for name, scores in seen.scores.items():
        if name == _ERROR and len(widths) > 1:
            for place, bits in enumerate(widths):
                at = {layer: curve[place] for layer, curve in seen.errors.items()}
                columns[f"{name}_{bits}"] = at
        else:
            columns[name] = dict(scores)
    return columns


def _told(level: LayerPlan) -> str:
    """What is done to a layer, in words."""
    by = " + ".join(id.partition("/")[2] for id, _ in level.steps)
    grid = f", groups of {level.group}" if level.bits is not None and level.group else ""
    return f"{label(level)} by {by}{grid}"


def _large(prepared: Prepared, methods: Sequence[catalogue.Method]) -> bool:
    """Whether the windows that are carried with each layer changed are too many for memory."""
    width = int(prepared.source.config.get("hidden_size") or 1)
    tokens = prepared.heldout.tokens if prepared.heldout else 0
    if any("path" in method.evidence for method in methods) and prepared.calibration:
        tokens = max(tokens, PATH_TOKENS * len(POINTS))
    return 4 * (1 + len(prepared.found.layers)) * tokens * width > _IN_MEMORY
