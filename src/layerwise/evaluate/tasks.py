"""Tasks of the language model evaluation harness, their results kept by the weights' content."""

import contextlib
import difflib
import hashlib
import io
import json
import logging
import math
import random
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerwise.core.errors import UserError
from layerwise.core.extras import need
from layerwise.core.keeping.cache import Cache, default_folder
from layerwise.core.reading.checkpoint import Checkpoint
from layerwise.core.reading.families import CAUSAL_MODELS
from layerwise.core.telling.outcome import TaskScore

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# Files beside the weights that cannot move an answer.
_PROSE = ("*.md", "LICENSE*", "NOTICE*")
_CACHE_BYTES = 1 << 28
_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class Tasks:
    """What is to be answered, and how.

    Attributes:
        names: Tasks, groups or tags of the harness, or of the files in `include_path`.
        limit: First items of each task; None for all.
        num_fewshot: Solved examples before each item; None for what the task says.
        batch_size: Items answered at once.
        include_path: Directory of more tasks, as YAML files.
        cached: Take results of an earlier run with the same weights, and keep those of this one.
        trust_remote_code: Let a tokenizer bring its own Python.
    """

    names: Sequence[str]
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    include_path: Path | None = None
    cached: bool = True
    trust_remote_code: bool = False


@dataclass(frozen=True)
class FoundTasks:
    """Tasks that are there: named, loaded once with their data, and digested."""

    settings: Tasks
    manager: Any
    digests: Mapping[str, str]


def find(settings: Tasks) -> FoundTasks:
    """Find tasks and their data, before any model is loaded.

    Raises:
        UserError: A task or its data is not there.
    """
    need("lm_eval", "--tasks")
    manager = _manager(settings)
    for name in settings.names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, 3)
            raise UserError(
                f"there is no task {name!r}.",
                f"Close to it: {', '.join(close)}." if close else
                f"lm-eval knows {len(manager.all_tasks):,}: `lm-eval ls tasks` lists them; "
                "--include-path DIR adds those of your own YAML files.",
            )  # fmt: skip
    return FoundTasks(settings, manager, {n: _task_digest(manager, n) for n in settings.names})


def _manager(settings: Tasks) -> Any:
    """What knows the tasks: the user's own alone where they are enough, for it reads every file."""
    made = need("lm_eval.tasks", "--tasks").TaskManager
    with _quiet():
        if settings.include_path is None:
            return made()
        own = str(settings.include_path)
        alone = made(include_path=own, include_defaults=False)
        return alone if set(settings.names) <= set(alone.all_subtasks) else made(include_path=own)


def check_settings(settings: Tasks) -> None:
    """Refuse settings that make no sense, whatever the tasks and the model.

    Raises:
        UserError: It names the setting.
    """
    if not settings.names:
        raise UserError("no task was named.", "Give --tasks arc_easy,hellaswag.")
    counts = {"limit": settings.limit, "batch_size": settings.batch_size}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"{name} is {count}.", "Give 1 or more.")
    if settings.num_fewshot is not None and settings.num_fewshot < 0:
        raise UserError(f"num_fewshot is {settings.num_fewshot}.", "Give 0 or more.")
    if settings.include_path is not None and not settings.include_path.is_dir():
        raise UserError(
            f"there is no directory {settings.include_path}.",
            "Give --include-path the directory that holds the tasks' YAML files.",
        )


def _task_digest(manager: Any, name: str) -> str:
    """Of all that a task asks: its configuration, the code in it, and its items.

    Raises:
        UserError: It cannot be loaded.
    """
    digest = hashlib.sha256()
    try:
        with _quiet():
            for task in manager.load([name])["tasks"].values():
                settings = dict(task.dump_config())
                metadata: dict[str, Any] = settings.get("metadata") or {}
                settings["metadata"] = {k: v for k, v in metadata.items() if k != "config_source"}
                digest.update(_plain(settings))
                for documents in (task.eval_docs, task.fewshot_docs() or ()):
                    _update(digest, documents)
    except Exception as error:  # a task is any code, and its data may be anywhere
        raise UserError(
            f"the task {name} cannot be loaded: {type(error).__name__}: {error}",
            "Check its YAML file, and that its data is here or the network is up.",
        ) from error
    return digest.hexdigest()


def _update(digest: Any, documents: Iterable[Any]) -> None:
    for document in documents:
        digest.update(_plain(document))
    digest.update(b"end")


def _plain(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, default=repr).encode()


def check_model(source: Checkpoint) -> None:
    """Refuse a model that no task can be put to.

    Raises:
        UserError: It has no tokenizer, or does not continue a text.
    """
    architecture = (source.config.get("architectures") or [""])[0]
    if not architecture.endswith(CAUSAL_MODELS):
        raise UserError(
            f"{source.label} is a {architecture or 'model of unknown class'}, which does not "
            "continue a text, as tasks ask for.",
            "Give a language model's directory.",
        )
    if not any(file.name in _TOKENIZERS for file in source.companions):
        raise UserError(
            f"{source.label} has no tokenizer, so tasks cannot become its tokens.",
            "Copy the tokenizer's files into the model's directory.",
        )


@dataclass(frozen=True)
class _Row:
    """One metric of one task, with its value for each item where it is a mean of such values."""

    score: TaskScore
    values: Sequence[float] | None


def answer_tasks(
    found: FoundTasks,
    source: Checkpoint,
    model: Callable[[], Any],
    base: Checkpoint | None = None,
    base_model: Callable[[], Any] | None = None,
) -> tuple[list[TaskScore], list[str]]:
    """Put tasks to a model, and to the one it was made from.

    Args:
        found: The tasks.
        source: The model's directory.
        model: Loads it; called if some answer is not kept from an earlier run.
        base: The original's directory.
        base_model: Loads that one.

    Returns:
        The scores, and what else the reader should know.

    Raises:
        UserError: The harness cannot run a task with this model.
    """
    kept = Cache(default_folder() / "tasks" if found.settings.cached else None, _CACHE_BYTES)
    rows = _rows(found, source, model, kept)
    if base is None or base_model is None:
        return [row.score for row in rows], kept.notes
    before = {(r.score.task, r.score.metric): r for r in _rows(found, base, base_model, kept)}
    scores = [_beside(row, before[row.score.task, row.score.metric]) for row in rows]
    return scores, kept.notes


def _rows(
    found: FoundTasks, source: Checkpoint, model: Callable[[], Any], kept: Cache
) -> list[_Row]:
    """The rows of every task, taken from the cache where they are there."""
    settings = found.settings
    content = _content_digest(source)
    version = need("lm_eval", "--tasks").__version__
    made: list[_Row] = []
    for name in settings.names:
        how = [version, name, settings.limit, settings.num_fewshot, found.digests[name], content]
        key = hashlib.sha256(json.dumps(how).encode()).hexdigest()
        entry = kept.get(key)
        rows = entry.facts["rows"] if entry else _answered(found, name, source, model())
        if entry is None:
            kept.put(key, {}, {"rows": rows})
        cached = entry is not None
        made += [_Row(TaskScore(**row, cached=cached), values) for row, values in rows]
    return made


def _content_digest(source: Checkpoint) -> str:
    """Of the bytes of the weights, the configuration and the tokenizer: not of names or times."""
    digest = hashlib.sha256()
    beside = [f for f in source.companions if not any(f.match(pattern) for pattern in _PROSE)]
    for file in [*sorted(set(source.files.values())), *beside]:
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        with file.open("rb") as handle:
            while chunk := handle.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _answered(found: FoundTasks, name: str, source: Checkpoint, model: Any) -> list[Any]:
    """What the harness says of a model, as plain data: rows, each with its values."""
    settings = found.settings
    transformers = need("transformers", "--tasks")
    try:
        with _quiet(), _same_dice():
            wrapped = need("lm_eval.models.huggingface", "--tasks").HFLM(
                pretrained=model,
                tokenizer=transformers.AutoTokenizer.from_pretrained(
                    str(source.folder), trust_remote_code=settings.trust_remote_code
                ),
                backend="causal",
                batch_size=settings.batch_size,
            )
            results = need("lm_eval.evaluator", "--tasks").simple_evaluate(
                model=wrapped,
                tasks=[name],
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                task_manager=found.manager,
            )
    except Exception as error:  # the harness raises whatever a task or tokenizer does
        raise UserError(
            f"lm-eval cannot put {name} to {source.label}: {type(error).__name__}: {error}",
            "See what it says; try --limit 1, or another task.",
        ) from error
    return _rows_of(results)


def _rows_of(results: Mapping[str, Any]) -> list[Any]:
    rows: list[Any] = []
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, comma, filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{filter}")
            values = _values(results["samples"].get(task, ()), metric, filter, float(value))
            better = results["higher_is_better"].get(task, {}).get(metric)
            row = {
                "task": task,
                "metric": metric if filter == "none" else f"{metric} ({filter})",
                "value": float(value),
                "error": float(error) if isinstance(error, int | float) else None,
                "items": int(metrics.get("sample_len", len(values or ()))),
                "fewshot": results["n-shot"].get(task),
                "version": str(results["versions"].get(task, "")),
                "higher_is_better": better,
            }
            rows.append((row, values))
    return rows


def _values(
    samples: Iterable[Mapping[str, Any]], metric: str, filter: str, value: float
) -> list[float] | None:
    """The metric of each item in order; None if the metric is no mean of them."""
    chosen = sorted(
        (sample for sample in samples if sample["filter"] == filter and metric in sample),
        key=lambda sample: sample["doc_id"],
    )
    values: list[Any] = [sample[metric] for sample in chosen]
    if not values or not all(isinstance(one, int | float) for one in values):
        return None
    numbers = [float(one) for one in values]
    same = math.isclose(sum(numbers) / len(numbers), value, rel_tol=1e-9, abs_tol=1e-12)
    return numbers if same else None


def _beside(row: _Row, before: _Row) -> TaskScore:
    """A score with that of the original, and their difference."""
    difference = row.score.value - before.score.value
    error, paired = None, False
    one, other = row.values, before.values
    if one and other and len(one) == len(other) > 1:
        gained = np.subtract(one, other)
        error, paired = float(gained.std(ddof=1)) / len(one) ** 0.5, True
    elif row.score.error is not None and before.score.error is not None:
        error = math.hypot(row.score.error, before.score.error)
    return replace(
        row.score,
        cached=row.score.cached and before.score.cached,
        before=before.score.value,
        before_error=before.score.error,
        difference=difference,
        difference_error=error,
        paired=paired,
    )


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """The harness logs, warns and draws bars; only the bars are shown, and on a terminal only."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    shown = contextlib.nullcontext() if sys.stderr.isatty() else _hidden()
    try:
        with warnings.catch_warnings(), shown:
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _hidden() -> contextlib.AbstractContextManager[object]:
    return contextlib.redirect_stderr(io.StringIO())


@contextlib.contextmanager
def _same_dice() -> Generator[None]:
    """The harness seeds every generator there is: give the caller's back as they were."""
    state, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numbers)
