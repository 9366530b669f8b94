"""The library: what the command line does, in as few lines of Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwise.core import catalogue
from layerwise.core.checkpoint import Checkpoint, Source, open_checkpoint, open_source
from layerwise.core.errors import UserError
from layerwise.core.forecast import Forecast
from layerwise.core.outcome import Comparison, Report
from layerwise.core.plan import Plan
from layerwise.core.progress import Progress, Silent
from layerwise.core.structure import Structure, structure
from layerwise.core.text import Text, windows
from layerwise.flow.compressing import compress as _compress
from layerwise.flow.evaluating import answers, compare
from layerwise.flow.evaluating import load as _load
from layerwise.flow.planning import Wish, check_level, make_plan
from layerwise.flow.preparing import Proving, Texts, check, prepare
from layerwise.flow.promising import foresight, promised
from layerwise.flow.survey import Survey, survey

Model = str | Path | nn.Module


@dataclass(frozen=True, slots=True)
class Opened:
    """A model's tensors and what layerwise makes of them."""

    source: Source
    structure: Structure


def open(model: Model) -> Opened:
    """Open a model without reading its weights.

    Args:
        model: Path, hub id, `builtin:tiny` or module.

    Raises:
        UserError: It cannot be read safely.
    """
    source = open_source(model)
    return Opened(source, structure(source))


def measure(
    model: Model,
    measures: str | Sequence[str] = ("weight_error", "zd"),
    *,
    calibration: Text | None = None,
    samples: int = 64,
    length: int = 256,
    levels: Sequence[int] = (),
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **wish: Any,
) -> Survey:
    """Score every layer.

    Args:
        model: Path, hub id, `builtin:tiny` or module.
        measures: Names of measures; those that compare see the first level, or 4 bits.
        calibration: Text to gather evidence on.
        samples: Windows of it.
        length: Tokens per window.
        levels: Widths to find the error of every layer at.
        device: Where the block at work is put: "cpu", "cuda", or "auto" for the better one here.
        trust_remote_code: Let the checkpoint bring its own Python.
        progress: Is told of each block.
        wish: Fields of `Wish` that say how a level is made: method, group, symmetric.
    """
    names = [measures] if isinstance(measures, str) else measures
    chosen = [catalogue.get(f"measure/{name}") for name in names]
    opened = open(model)
    wanted = Wish(**wish).fitted(opened.structure)
    comparing = any("approximation" in method.evidence for method in chosen)
    tried = [wanted.level(bits) for bits in levels or ([4] if comparing else [])]
    steps = [catalogue.get(id) for level in tried for id, _ in level.steps]
    prepared = prepare(
        opened.source,
        opened.structure,
        [*chosen, *steps],
        Texts(calibration, samples, length),
        proof="none",
        device=device,
        trust_remote_code=trust_remote_code,
    )
    for level in tried:
        check_level(prepared, wanted, level)
    ids = prepared.calibration.ids if prepared.calibration else None
    return survey(
        prepared.source,
        prepared.found,
        prepared.runner,
        ids,
        levels=tried,
        options=wanted.options,
        measures=chosen,
        progress=progress or Silent(),
    )


def plan(
    model: Model,
    *,
    calibration: Text | None = None,
    samples: int = 64,
    length: int = 256,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **wish: Any,
) -> Plan:
    """Decide what every layer gets.

    Args:
        model: Path, hub id, `builtin:tiny` or module.
        calibration: Text to gather evidence on.
        samples: Windows of it.
        length: Tokens per window.
        device: Where the block at work is put: "cpu", "cuda", or "auto" for the better one here.
        trust_remote_code: Let the checkpoint bring its own Python.
        progress: Is told of each block.
        wish: Fields of `Wish`: bits or budget, method, group, symmetric, density, rank …

    Raises:
        UserError: The wish cannot be met.
    """
    wanted = Wish(**wish)
    opened = open(model)
    prepared = prepare(
        opened.source,
        opened.structure,
        wanted.methods(),
        Texts(calibration, samples, length),
        proof="none",
        device=device,
        trust_remote_code=trust_remote_code,
    )
    made = make_plan(prepared, wanted, progress or Silent())
    check(prepared, made)
    return made


def forecast(
    model: Model,
    plan: Plan,
    *,
    calibration: Text | None = None,
    samples: int = 64,
    length: int = 256,
    text: Text | None = None,
    text_samples: int = 32,
    proof: Proving = "auto",
    max_memory: str = "",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Forecast:
    """Say what `compress` would take to carry out a plan: size, memory, time.

    Args:
        model: Path, hub id, `builtin:tiny` or module.
        plan: What would be carried out.
        calibration: Text to gather evidence on.
        samples: Windows of it.
        length: Tokens per window.
        text: Text to compare on.
        text_samples: Windows of it.
        proof: What would be proven.
        max_memory: The most memory that may be held, such as "4GiB"; "" for no limit.
        device: Where the block at work would be put.
        trust_remote_code: Let the checkpoint bring its own Python.

    Raises:
        UserError: The plan cannot be carried out, or not within `max_memory`.
    """
    opened = open(model)
    prepared = prepare(
        opened.source,
        opened.structure,
        plan.methods(),
        Texts(calibration, samples, length, text, text_samples),
        proof=proof,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    seen = foresight(prepared, plan, check(prepared, plan).size)
    return promised(seen, max_memory)[1]


def compress(
    model: Model,
    out: str | Path,
    *,
    plan: str | Path | Plan | None = None,
    calibration: Text | None = None,
    samples: int = 64,
    length: int = 256,
    text: Text | None = None,
    text_samples: int = 32,
    proof: Proving = "auto",
    max_memory: str = "",
    device: str = "cpu",
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    recipe: Mapping[str, Any] | None = None,
    **wish: Any,
) -> Report:
    """Make a smaller model, prove it, and write it as a directory.

    Args:
        model: Path, hub id, `builtin:tiny` or module.
        out: Directory to make; must not exist.
        plan: A plan, or the file of one; otherwise `wish` makes one.
        calibration: Text to gather evidence on.
        samples: Windows of it.
        length: Tokens per window.
        text: Text to compare on; by default one that calibration did not see.
        text_samples: Windows of it.
        proof: "logits" loads the files back and compares; "auto" does if the model can run.
        max_memory: The most memory that may be held, such as "4GiB"; "" for no limit.
        device: Where the block at work is put: "cpu", "cuda", or "auto" for the better one here.
        restart: Throw away a stopped run with other options.
        trust_remote_code: Let the checkpoint bring its own Python.
        progress: Is told of the stages.
        recipe: What to write beside the output as recipe.yaml.
        wish: Fields of `Wish`: bits or budget, method, group, symmetric, density, rank, format …

    Raises:
        UserError: Something is not as it must be; nothing was written.
    """
    if plan is not None and wish:
        raise UserError(
            f"the plan says what to do, and {sorted(wish)[0]} says it too.",
            "Leave one out, or change the plan.",
        )
    return _compress(
        model,
        out,
        Wish(**wish),
        Texts(calibration, samples, length, text, text_samples),
        progress or Silent(),
        plan=Path(plan) if isinstance(plan, str) else plan,
        proof=proof,
        max_memory=max_memory,
        device=device,
        restart=restart,
        trust_remote_code=trust_remote_code,
        recipe=recipe,
    )


def load(
    model: str | Path, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> Any:
    """Load a model into transformers, whatever format layerwise wrote it in.

    Args:
        model: Path, hub id or `builtin:tiny`.
        dtype: What it is to compute in.
        trust_remote_code: Let the checkpoint bring its own Python.

    Returns:
        A transformers model in evaluation mode, its weights in full.

    Raises:
        UserError: It is not there, or a package it needs is missing.
    """
    return _loaded(open_checkpoint(model), dtype, trust_remote_code)


def _loaded(source: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    try:
        return _load(source, dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError, KeyError) as error:
        raise UserError(
            f"transformers cannot load {source.label}: {error}",
            "See what it says; the checkpoint or its config.json may be damaged.",
        ) from error


def evaluate(
    model: str | Path,
    *,
    against: str | Path | None = None,
    text: Text = "builtin",
    samples: int = 128,
    length: int = 256,
    trust_remote_code: bool = False,
) -> Comparison:
    """Perplexity of a model on a text, and its divergence from another one.

    Both are loaded with transformers, as their users will load them.

    Args:
        model: Path, hub id or `builtin:tiny`; quantized ones too.
        against: The model it was made from.
        text: Held-out text.
        samples: Windows of it.
        length: Tokens per window.
        trust_remote_code: Let the checkpoint bring its own Python.

    Raises:
        UserError: A model or the text is not there, or the two have different vocabularies.
    """
    source = open_checkpoint(model)
    chosen = windows(source, text, samples=samples, length=length, role="heldout")
    base = None if against is None else open_checkpoint(against)
    if base and base.config.get("vocab_size") != source.config.get("vocab_size"):
        raise UserError(
            f"{source.label} has {source.config.get('vocab_size')} tokens, {base.label} has "
            f"{base.config.get('vocab_size')}.",
            "Give the model that it was made from.",
        )
    models = [
        _loaded(one, torch.float32, trust_remote_code) for one in (source, base) if one is not None
    ]
    streams = [answers(one, chosen.ids) for one in models]
    return compare(chosen.ids, streams[0], streams[1] if base else None, chosen.label)
