"""Compress: plan, check, transform, write, load back, compare, report."""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from layerwise import __version__, export
from layerwise.core import memory
from layerwise.core.activations import Activations, filled
from layerwise.core.checkpoint import Checkpoint, ModuleSource, open_checkpoint, open_source
from layerwise.core.economy import Economy
from layerwise.core.format import Format
from layerwise.core.outcome import Comparison, LayerRow, Proof, Report
from layerwise.core.plan import Plan, read_plan, to_yaml
from layerwise.core.progress import Progress
from layerwise.core.runner import Runner
from layerwise.core.staging import Staging, check_target, stage
from layerwise.core.stream import stream
from layerwise.core.structure import structure
from layerwise.core.text import Windows
from layerwise.core.walk import Walked, walk
from layerwise.flow.evaluating import answers, compare, load
from layerwise.flow.planning import Wish, make_plan
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

# Float32 sums in another order move a logit by about 1e-6 of the largest one; a wrong scale, zero
# point or order of codes moves it by far more than this.
ALLOWED = 1e-4


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
        device: Where the block at work is put: "cpu", "cuda", or "auto" for the better one here.
        restart: Throw away a stopped run with other options.
        trust_remote_code: Let the checkpoint bring its own Python.
        recipe: How this run was asked for; written beside the output.

    Raises:
        UserError: The output was not made.
        RuntimeError: What was written does not answer as the model in memory did.
    """
    begun, used = time.perf_counter(), memory.cpu_seconds()
    target = Path(os.path.abspath(Path(out).expanduser()))  # "new/.." is no place for an output
    check_target(target)
    source = open_source(model)
    found = structure(source)
    ready = read_plan(plan, found) if isinstance(plan, Path) else plan
    methods = ready.methods() if ready else wish.methods()
    format = export.get(ready.format if ready else wish.format, source)
    prepared = prepare(
        source,
        found,
        methods,
        texts,
        format=format,
        proof=proof,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if ready is None:
        ready = make_plan(prepared, wish, progress)
    arrangement = check(prepared, ready)
    economy, foreseen = promised(foresight(prepared, ready, arrangement.size), max_memory)
    check_disk(target, foreseen.disk_bytes)
    progress.tell(foreseen.words())
    working = time.perf_counter()
    staging = stage(target, arrangement, _identity(prepared, ready), restart=restart)
    with staging:
        rows, comparison, answered = _transform(prepared, ready, format, staging, progress, economy)
        staging.add(_small_files(prepared, ready, format, recipe or {}))
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
            comparison=comparison,
            proof=proved,
            seconds=time.perf_counter() - begun,
            work_seconds=time.perf_counter() - working,
            cpu_seconds=memory.cpu_seconds() - used,
            peak_bytes=memory.peak_bytes(),
            forecast=foreseen.as_json(),
            notes=[*_notes(prepared, ready), *economy.notes()],
            disk_bytes=staging.most_bytes,
        )
        staging.add({"report.json": (json.dumps(report.as_json(), indent=2) + "\n").encode()})
        staging.publish()
    return report


def _average_bits(rows: Sequence[LayerRow]) -> float:
    stored = sum(row.stored_bits * row.rows * row.width for row in rows)
    return stored / sum(row.rows * row.width for row in rows)


def _identity(prepared: Prepared, plan: Plan) -> str:
    """Says what a run is: the same inputs and the same plan give the same bytes."""
    source = prepared.source
    work = {name: asdict(layer.work) for name, layer in plan.layers.items()}
    options = {id: dict(chosen) for id, chosen in plan.options.items()}
    said = [__version__, plan.format, work, options, dict(source.config)]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode())
    for info in source.tensors.values():
        digest.update(f"{info.name} {info.dtype} {info.shape}".encode())
        if isinstance(source, ModuleSource):
            digest.update(_content(source.read(info.name)))
    if isinstance(source, Checkpoint):
        for file in sorted(set(source.files.values())):
            stat = file.stat()
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    for text in (prepared.calibration, prepared.heldout):
        digest.update(f"{None if text is None else tuple(text.ids.shape)}".encode())
        if text is not None:
            digest.update(_content(text.ids))
    device = prepared.runner.device if prepared.runner else "cpu"
    digest.update(str(device).encode())
    return digest.hexdigest()


def _content(tensor: Tensor) -> memoryview:
    """A tensor's bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _transform(
    prepared: Prepared,
    plan: Plan,
    format: Format,
    staging: Staging,
    progress: Progress,
    economy: Economy,
) -> tuple[list[LayerRow], Comparison | None, Tensor | None]:
    """Write the tensors; the comparison and the logits of the proof, if the model was run."""
    runner, heldout = prepared.runner, prepared.heldout
    if runner is None or (heldout is None and prepared.calibration is None):
        rows = stream(prepared.source, prepared.found, plan, format, staging, progress, economy)
        return rows, None, None
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
        economy=economy,
    )
    if heldout is None:
        return walked.rows, None, None
    runner = runner.running(economy.tokens)
    count = min(PROOF_WINDOWS, len(heldout.ids))
    first = filled(_logits(runner, walked.heldout, heldout.ids, count), count)
    if runner.whole:
        return walked.rows, None, first
    return walked.rows, _compare(runner, walked, heldout), first


def _compare(runner: Runner, walked: Walked, heldout: Windows) -> Comparison:
    outer = runner.outer()
    return compare(
        heldout.ids,
        runner.logits(walked.heldout, heldout.ids, {}, outer),
        runner.logits(walked.heldout_before, heldout.ids, {}, outer),
        heldout.label,
    )


def _logits(runner: Runner, hidden: Activations, ids: Tensor, count: int) -> Iterator[Tensor]:
    return runner.logits(hidden[:count], ids[:count], {})


def _small_files(
    prepared: Prepared, plan: Plan, format: Format, recipe: Mapping[str, Any]
) -> dict[str, bytes | Path]:
    source = prepared.source
    files: dict[str, bytes | Path] = {file.name: file for file in source.companions}
    added = format.config(plan, prepared.found)
    if added:
        config = dict(source.config) | dict(added)
        files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    files["plan.yaml"] = to_yaml(plan, source.label, prepared.found).encode()
    if recipe:
        files["recipe.yaml"] = yaml.safe_dump(dict(recipe), sort_keys=False).encode()
    return files


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
    if isinstance(source, ModuleSource):
        tensors = export.get(plan.format, written).read() or {
            name: written.read(name) for name in written.tensors
        }
        assert prepared.runner is not None
        found: Iterable[Tensor] = [prepared.runner.answer(tensors, ids)]
        loader = "safetensors"
    else:
        model = load(written, trust_remote_code=trust_remote_code)
        found = answers(model, ids, economy.tokens)
        loader = f"transformers {type(model).__name__}"
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
    notes: list[str] = []
    if prepared.heldout is None:
        notes.append("not proven: the model was not run on a text after it was made")
    if plan.format == "dense" and any(p.bits is not None for p in plan.layers.values()):
        notes.append(
            "a dense file keeps its size whatever the bits; --format compressed-tensors packs them"
        )
    if plan.format != "layerwise" and any(p.density < 1 for p in plan.layers.values()):
        notes.append("pruned weights are stored as zeros; --format layerwise leaves them out")
    return notes
