"""What `evaluate` says, on the terminal; a figure stands with its standard error."""

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from layerwise.core.telling.outcome import (
    Comparison,
    Detection,
    Evaluation,
    ImageScores,
    Savings,
    TaskScore,
)

_DIGEST = 12


def figure(value: float | None, error: float | None = None) -> str:
    """A figure as 0.0172 ± 0.0006: four decimals, more where two digits of the error need them."""
    if value is None:
        return "-"
    if error is None:
        return f"{value:.4f}"
    decimals = 4 if error <= 0 else min(9, max(4, 1 - math.floor(math.log10(error))))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def share(value: float | None, error: float | None = None) -> str:
    """A share in per cent, as 98.40% ± 0.21%."""
    if value is None:
        return "-"
    return f"{value:.2%}" if error is None else f"{value:.2%} ± {error:.2%}"


def windows_line(seen: Comparison) -> Text:
    """What was read, so that another can read the same."""
    return Text(
        f"read {seen.windows:,} windows of {seen.length} tokens, {seen.tokens:,} of them predicted "
        f"(the first of a window is not), from {seen.text}; special tokens: {seen.special}; "
        f"SHA-256 of the ids {seen.digest[:_DIGEST]}…"
    )


def evaluation(seen: Evaluation) -> Group:
    """The outcome of `evaluate`."""
    parts: list[RenderableType] = []
    if seen.text is not None:
        parts += [_text_table(seen.text, seen.noise_floor), windows_line(seen.text)]
        parts.append(Text("±: standard error over windows, analytic"))
    if seen.tasks:
        parts += [_task_table(seen.tasks), *_task_lines(seen.tasks)]
    if seen.images is not None:
        parts += [_image_table(seen.images), *_image_lines(seen.images)]
    if seen.savings is not None:
        parts += [_savings_table(seen.savings), *_savings_lines(seen.savings)]
    if seen.detection is not None:
        parts += [_detection_table(seen.detection), *_detection_lines(seen.detection)]
    return Group(*parts, *(Text(f"note: {note}") for note in seen.notes))


def _text_table(seen: Comparison, floor: Comparison | None) -> Table:
    table = _table("", "value", *(["original in bfloat16 (noise floor)"] if floor else []))
    for name, row in zip(
        ("perplexity", "perplexity of the original", "loss added, nats", "KL, nats", "top-1"),
        zip(*(_text_column(one) for one in (seen, floor) if one is not None), strict=True),
        strict=False,
    ):
        table.add_row(name, *row)
    return table


def _text_column(seen: Comparison) -> list[str]:
    alone = [figure(seen.perplexity, seen.perplexity_error)]
    if seen.kl is None:
        return alone
    return [
        *alone,
        figure(seen.perplexity_before, seen.perplexity_before_error),
        figure(seen.loss_added, seen.loss_added_error),
        figure(seen.kl, seen.kl_error),
        share(seen.top1, seen.top1_error),
    ]


def _task_table(scores: Sequence[TaskScore]) -> Table:
    compared = any(score.before is not None for score in scores)
    more = ("original", "difference") if compared else ()
    table = _table("task", "metric", "items", "shots", "value", *more)
    for score in scores:
        better = {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
        table.add_row(
            score.task,
            score.metric + better,
            f"{score.items:,}",
            "-" if score.fewshot is None else str(score.fewshot),
            figure(score.value, score.error),
            *((figure(score.before, score.before_error), _difference(score)) if compared else ()),
        )
    return table


def _difference(score: TaskScore) -> str:
    sign = "+" if score.difference is not None and score.difference > 0 else ""
    return sign + figure(score.difference, score.difference_error)


def _task_lines(scores: Sequence[TaskScore]) -> list[Text]:
    lines: list[Text] = []
    kept = [score for score in scores if score.cached]
    if kept:
        names = ", ".join(dict.fromkeys(score.task for score in kept))
        lines.append(Text(f"from the cache, of an earlier run with these very weights: {names}"))
    if any(score.before is not None for score in scores):
        apart = dict.fromkeys(
            score.task for score in scores if score.difference_error and not score.paired
        )
        rest = f"; of independent runs for {', '.join(apart)}" if apart else ""
        lines.append(Text(f"±: standard error; of a difference, item by item{rest}"))
    return lines


def _detection_table(seen: Detection) -> Table:
    table = _table("text", "class", "tokens", *seen.texts[0].scores)
    for one in seen.texts:
        values = [figure(value) for value in one.scores.values()]
        table.add_row(Text(one.text), Text(one.label or "-"), f"{one.tokens:,}", *values)
    return table


def _detection_lines(seen: Detection) -> list[Text]:
    lines = [Text(f"{len(seen.texts):,} texts from {seen.source}; a higher score: more a model's")]
    if seen.short:
        lines.append(Text(f"{seen.short:,} more are too short to be scored"))
    if seen.auroc:
        told = ", ".join(f"{name} {value:.4f}" for name, value in seen.auroc.items())
        lines.append(Text(f"AUROC, {seen.machine} against the others: {told}"))
    return lines


def _image_table(seen: ImageScores) -> Table:
    compared = seen.accuracy_before is not None
    table = _table("", "value", *(["original"] if compared else []))
    names = ("accuracy", "top-5 accuracy")
    rows = [
        (seen.accuracy, seen.accuracy_error, seen.accuracy_before, seen.accuracy_before_error),
        (seen.top5, seen.top5_error, seen.top5_before, seen.top5_before_error),
    ]
    for name, (value, error, before, before_error) in zip(names, rows, strict=True):
        if value is not None:
            table.add_row(
                name, share(value, error), *([share(before, before_error)] if compared else [])
            )
    if compared:
        table.add_row("accuracy gained", share(seen.gained, seen.gained_error))
        table.add_row("agreement", share(seen.agreement, seen.agreement_error))
        table.add_row("KL, nats", figure(seen.kl, seen.kl_error))
    return table


def _image_lines(seen: ImageScores) -> list[Text]:
    return [
        Text(
            f"{seen.images:,} images of {seen.classes} classes from {seen.source}; "
            f"{seen.normalised}; SHA-256 {seen.digest[:_DIGEST]}…"
        ),
        Text("±: standard error over images, analytic"),
    ]


def _savings_table(seen: Savings) -> Table:
    table = _table("", "dense", seen.method, "saved")
    rows = [("operations", seen.flops_dense, seen.flops)]
    if seen.cache_dense:
        rows.append(("bytes of keys and values", seen.cache_dense, seen.cache))
    for name, before, after in rows:
        table.add_row(name, f"{before:,}", f"{after:,}", share(1 - after / before))
    return table


def _savings_lines(seen: Savings) -> list[Text]:
    lines = [Text(f"kept {seen.kept:.2%} of what {seen.method} chooses among")]
    if seen.sparse_kernel:
        lines.append(
            Text("operations saved are those of a kernel that skips zeros: here they were done")
        )
    if seen.after:
        lines.append(
            Text(f"the first {seen.after} tokens of a window are a prompt, and are not judged")
        )
    return lines


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table
