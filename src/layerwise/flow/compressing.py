"""Compress: plan, check, transform, write, load back, compare, report."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from layerwise import export
from layerwise.core import memory
from layerwise.core.economy import Economy, memory_limit
from layerwise.core.environment import environment
from layerwise.core.format import Format
from layerwise.core.keeping.cache import Cache
from layerwise.core.keeping.candidates import Candidates
from layerwise.core.keeping.staging import Staging, check_target, stage
from layerwise.core.plan import Plan, read_plan, read_rewriting, to_yaml
from layerwise.core.progress import Progress
from layerwise.core.reading.checkpoint import ModuleSource, Source, open_checkpoint, open_source
from layerwise.core.reading.structure import structure
from layerwise.core.reading.text import Windows
from layerwise.core.rewriting.rewriting import Rewritten, notes_of, original
from layerwise.core.running.carried import filled, shelf
from layerwise.core.running.runner import Runner
from layerwise.core.running.stream import stream
from layerwise.core.running.tuning import told
from layerwise.core.running.walk import Walked, restored_outside, walk
from layerwise.core.telling.outcome import Comparison, LayerRow, Proof, Report
from layerwise.evaluate.text import compare
from layerwise.flow.identity import candidates_of, run_identity
from layerwise.flow.loading import (
    LoadedTrial,
    answers,
    causal,
    load,
    load_into,
    loader_of,
)
from layerwise.flow.planning import Planned, make_plan
from layerwise.flow.preparing import (
    PROOF_WINDOWS,
    Prepared,
    Proving,
    Texts,
    check,
    check_disk,
    prepare,
)
from layerwise.flow.promising import foresight, promised
from layerwise.flow.proving import predicted
from layerwise.flow.rewriting import rewritten
from layerwise.flow.wish import Wish
from layerwise.report.html import html

# Float32 sums in another order move a logit by about 1e-6 of the largest one; a wrong scale, zero
# point or order of codes moves it by far more than this.
ALLOWED = 1e-4
# Windows of the calibration text that a written model is tried on with other tensors.
TRIED_WINDOWS = 8


def compress(
    model: str | Path | nn.Module,
    out: str | Path,
    wish: Wish,
    texts: Texts,
    progress: Progress,
    *,
    plan: Path | Plan | None = None,
    proof: Proving = "auto",
    max_memory: str = "",
    cache: Cache,
    layer_windows: int = 4,
    device: str = "cpu",
    restart: bool = False,
    trust_remote_code: bool = False,
    recipe: Mapping[str, Any] | None = None,
) -> Report:
    """Make a smaller model and prove it.

    Args:
        model: Path, hub id, `builtin:tiny` or module.
        out: Directory to make.
        wish: What to do, if there is no plan.
        texts: What to calibrate on and compare on.
        progress: Is told of the stages.
        plan: A plan, or the file of one.
        proof: "logits" loads the files back and compares; "auto" does if the model can run.
        max_memory: The most memory that may be held, such as "4GiB"; "" for no limit.
        cache: Where results are kept for other budgets.
        layer_windows: Windows of the proof's text on which each layer's own KL is measured, when
            a budget was shared out; 0 leaves that out.
        device: Where the block at work is put: "cpu", "cuda", or "auto" for the better one here.
        restart: Throw away a stopped run with other options.
        trust_remote_code: Let the checkpoint bring its own Python.
        recipe: How this run was asked for; written beside the output and into the report.

    Raises:
        UserError: The output was not made.
        RuntimeError: What was written does not answer as the model in memory did.
    """
    begun, used = time.perf_counter(), memory.cpu_seconds()
    target = Path(os.path.abspath(Path(out).expanduser()))  # "new/.." is no place for an output
    check_target(target)
    if max_memory:
        memory_limit(max_memory)  # what is no amount is refused before anything is read
    source = open_source(model)
    asked = plan if isinstance(plan, Plan) else wish
    first = read_rewriting(plan) if isinstance(plan, Path) else (asked.rewriting, asked.options)
    if plan is None:
        wish.methods()  # what is misspelt is refused before a model is run
    source = rewritten(
        source,
        first[0],
        texts,
        options=first[1],
        device=device,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    found = structure(source)
    ready = read_plan(plan, found) if isinstance(plan, Path) else plan
    methods = ready.methods() if ready else wish.methods()
    format = export.get(ready.format if ready else wish.format, source, (ready or wish).options)
    prepared = prepare(
        source,
        found,
        methods,
        texts,
        needing=(ready or wish).needing,
        learning=() if ready else wish.learning,
        format=format,
        proof=proof,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    candidates = candidates_of(prepared, cache)
    if ready is None:
        planned = make_plan(prepared, wish, candidates, progress, max_memory)
    else:
        planned = Planned(ready)
    ready = planned.plan
    if not (ready.words() or ready.needing):
        # What said which blocks or units go is done with the text.
        prepared = replace(prepared, calibration=None)
    arrangement = check(prepared, ready)
    apart = layer_windows if planned.curves else 0
    seen = foresight(
        prepared,
        ready,
        arrangement.size,
        apart=apart,
        before=planned.foreseen.peak_bytes if planned.foreseen else None,
        candidates=candidates,
    )
    economy, foreseen = promised(seen, max_memory)
    check_disk(target, foreseen.disk_bytes)
    progress.tell(foreseen.words())
    working = time.perf_counter()
    staging = stage(target, arrangement, run_identity(prepared, ready), restart=restart)
    with staging:
        if prepared.runner is not None:
            prepared = replace(prepared, runner=prepared.runner.running(economy.tokens))
        rows, compared, answered, tuned = _transform(
            prepared, ready, format, staging, candidates, progress, economy
        )
        prediction = None
        if layer_windows and compared and planned.curves:
            with shelf(economy.on_disk, staging.folder) as kept:
                rows, prediction = predicted(
                    prepared, planned, rows, compared[0], candidates, layer_windows, progress, kept
                )
        staging.add(_small_files(prepared, ready, format, recipe or {}))
        if format.tries:
            staging.add(
                _tried(prepared, ready, staging.folder, progress, trust_remote_code, economy)
            )
        proved = _prove(
            prepared, ready, staging.folder, answered, progress, trust_remote_code, economy
        )
        report = Report(
            model=source.label,
            out=str(out),
            format=ready.format,
            layers=rows,
            left=found.left,
            bytes_before=source.size,
            bytes_after=arrangement.size,
            average_bits=_average_bits(rows),
            comparison=compared[0] if compared else None,
            proof=proved,
            seconds=time.perf_counter() - begun,
            work_seconds=time.perf_counter() - working,
            cpu_seconds=memory.cpu_seconds() - used,
            peak_bytes=memory.peak_bytes(),
            forecast=foreseen.as_json(),
            noise_floor=compared[1] if len(compared) > 1 else None,
            notes=[
                *planned.notes,
                *tuned,
                *_notes(prepared, ready),
                *economy.notes(),
                *cache.notes,
            ],
            prediction=prediction,
            environment=environment(str(prepared.runner.device) if prepared.runner else "cpu"),
            recipe=recipe or {"compress": _asked(source, out, wish, texts, plan)},
            disk_bytes=staging.most_bytes,
        )
        told = json.dumps(report.as_json(), indent=2) + "\n"
        staging.add({"report.json": told.encode(), "report.html": html(report).encode()})
        staging.publish()
    return report


def _asked(
    source: Source, out: str | Path, wish: Wish, texts: Texts, plan: Path | Plan | None
) -> dict[str, Any]:
    """How a run without a recipe was asked for: what is not as it would be anyway."""
    usual, wished = (
        asdict(one)
        | {"samples": text.samples, "length": text.length, "text_samples": text.heldout_samples}
        for one, text in ((Wish(), Texts()), (wish, texts))
    )
    wished = {name: value for name, value in wished.items() if value != usual[name]}
    # A text can be a tensor or a long list; what it was is enough.
    named = {
        name: str(text) if isinstance(text, str | Path) else f"a {type(text).__name__}"
        for name, text in (("calibration", texts.calibration), ("text", texts.heldout))
        if text is not None
    }
    planned = {} if plan is None else {"plan": str(plan) if isinstance(plan, Path) else "a Plan"}
    return {"model": source.label, "out": str(out), **planned, **wished, **named}


def _average_bits(rows: Sequence[LayerRow]) -> float:
    stored = sum(row.stored_bits * row.rows * row.width for row in rows)
    return stored / sum(row.rows * row.width for row in rows)


def _transform(
    prepared: Prepared,
    plan: Plan,
    format: Format,
    staging: Staging,
    candidates: Candidates,
    progress: Progress,
    economy: Economy,
) -> tuple[list[LayerRow], Sequence[Comparison], Tensor | None, list[str]]:
    """Write the tensors; if the model was run, compare it, and give the logits of the proof.

    The first comparison is of the result, the second of the original in bfloat16.  Last comes what
    was tuned, in words.
    """
    runner, heldout = prepared.runner, prepared.heldout
    if runner is None or (heldout is None and prepared.calibration is None):
        rows = stream(prepared.source, prepared.found, plan, format, staging, progress, economy)
        return rows, (), None, []
    calibration = prepared.calibration
    ids = heldout.ids if heldout else None
    carried = ids if ids is not None else (calibration.ids[:1] if calibration else torch.zeros(0))
    walked = walk(
        runner,
        prepared.found,
        plan,
        format,
        staging,
        progress,
        calibration=calibration.ids if calibration else None,
        heldout=carried,
        noise_floor=prepared.noise_floor,
        candidates=candidates,
        economy=economy,
    )
    tuned = told(walked.tuned)
    if heldout is None:
        return walked.rows, (), None, tuned
    around = restored_outside(runner, format)
    shown = heldout.ids[:PROOF_WINDOWS]
    # A generator that is kept keeps the logits it gave last.
    first = filled(runner.logits(walked.heldout[:PROOF_WINDOWS], shown, around), len(shown))
    # Only a text is compared here: what else a model answers is proven, and no more.
    if runner.whole or first.dim() != 3:
        return walked.rows, (), first, tuned
    return walked.rows, _compare(runner, walked, heldout, around), first, tuned


def _compare(
    runner: Runner, walked: Walked, heldout: Windows, around: Mapping[str, Tensor]
) -> list[Comparison]:
    memory.settle()  # what the walk let go of
    before = runner.original
    outer = before.outer()
    changed = outer if before is runner and not around else None
    results = [runner.logits(walked.heldout, heldout.ids, around, changed)]
    if walked.heldout_floor is not None:
        results.append(before.logits(walked.heldout_floor, heldout.ids, {}))
    return compare(heldout, results, before.logits(walked.heldout_before, heldout.ids, {}, outer))


def _small_files(
    prepared: Prepared, plan: Plan, format: Format, recipe: Mapping[str, Any]
) -> dict[str, bytes | Path]:
    source = prepared.source
    files: dict[str, bytes | Path] = {file.name: file for file in source.companions}
    added = format.config(plan, prepared.found)
    if added or (source.config and isinstance(source, Rewritten)):
        config = dict(source.config) | dict(added)
        files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    files |= format.files(plan, prepared.found)
    files["plan.yaml"] = to_yaml(plan, source.label, prepared.found).encode()
    if recipe:
        files["recipe.yaml"] = yaml.safe_dump(dict(recipe), sort_keys=False).encode()
    return files


def _tried(
    prepared: Prepared,
    plan: Plan,
    folder: Path,
    progress: Progress,
    trust_remote_code: bool,
    economy: Economy,
) -> Mapping[str, bytes]:
    """The small files that the written model must be run for, if it is to be loaded back."""
    written, trial = open_checkpoint(folder), None
    language = causal(prepared.source)
    if prepared.heldout is not None and prepared.calibration is not None and language:
        progress.stage("try blocks", 1)
        memory.settle()
        model = load(written, trust_remote_code=trust_remote_code)
        trial = LoadedTrial(model, prepared.calibration.ids[:TRIED_WINDOWS], economy.tokens)
    made = export.get(plan.format, written, plan.options).finished(trial)
    if trial is not None:
        progress.step("try blocks")
    return made


def _prove(
    prepared: Prepared,
    plan: Plan,
    folder: Path,
    expected: Tensor | None,
    progress: Progress,
    trust_remote_code: bool,
    economy: Economy,
) -> Proof | None:
    """Load the files back with the loader their users will have, and compare.

    Raises:
        RuntimeError: They do not answer as the model in memory did.
    """
    if expected is None or prepared.heldout is None:
        return None
    progress.stage("load back", 1)
    memory.settle()
    ids = prepared.heldout.ids[:PROOF_WINDOWS]
    source, written = prepared.source, open_checkpoint(folder)
    if isinstance(before := original(source), ModuleSource):
        model = load_into(written, before.module).float()
        loader = "safetensors"
    else:
        model = load(written, trust_remote_code=trust_remote_code)
        loader = loader_of(written, model)
    found = answers(model, ids, economy.tokens)
    difference, at = 0.0, 0
    for part in found:
        differs = (part.float() - expected[at : at + len(part)]).abs().max()
        # NaN is no difference that `max` would keep.
        difference = float("nan") if differs.isnan() else max(difference, float(differs))
        at += len(part)
    progress.step("load back")
    allowed = ALLOWED * float(expected.abs().max())
    if not difference <= allowed:
        raise RuntimeError(
            f"the files in {folder} do not answer as the model in memory did: logits differ by up "
            f"to {difference:.3g}, {allowed:.3g} is allowed ({loader})"
        )
    return Proof(loader, difference, allowed, ids.numel())


def _notes(prepared: Prepared, plan: Plan) -> list[str]:
    notes = [*notes_of(prepared.source)]
    if prepared.heldout is None:
        notes.append("not proven: the model was not run on a text after it was made")
    if plan.format == "dense" and any(p.bits is not None for p in plan.layers.values()):
        notes.append(
            "a dense file keeps its size whatever the bits; --format compressed-tensors packs them"
        )
    kept = {p.method for p in plan.layers.values() if p.dense and p.bits is not None}
    if kept:
        notes.append(
            f"{plan.format} has no place for the codes of {', '.join(sorted(kept))}: those layers "
            "are stored in full; --format layerwise packs them"
        )
    if plan.format != "layerwise" and any(p.density < 1 for p in plan.layers.values()):
        notes.append("pruned weights are stored as zeros; --format layerwise leaves them out")
    if export.kind(plan.format).adapts and any(p.rank for p in plan.layers.values()):
        notes.append(
            f"low-rank corrections lie in {export.ADAPTER_CONFIG.partition('/')[0]}/ as an adapter "
            "(vLLM: --enable-lora; peft: PeftModel.from_pretrained)"
        )
    return notes
