"""Weight-only work: tensors are read and written one at a time, and the model is never built.

Beside the tensor and its result, memory holds one slice of rows in float32 where the plan's
methods treat rows apart, and the whole layer where they do not.
"""

import contextlib
import math
from collections.abc import Generator, Mapping, Sequence

import torch
from torch import Tensor

from layerwise.core import catalogue
from layerwise.core.apply import check_finite, lost_share, transform
from layerwise.core.checkpoint import Source, TensorInfo
from layerwise.core.format import Format
from layerwise.core.outcome import LayerRow
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.progress import Progress
from layerwise.core.staging import Staging
from layerwise.core.structure import Layer, Structure

# A slice in float32 should stay in the processor's cache while a method works on it.
SLICE_ENTRIES = 1 << 18
_COPY_BYTES = 1 << 24
# Each step ends with the disk; smaller steps would only wait for it.
_STEP_BYTES = 1 << 27
ROW_STEP = 32


def stream(
    source: Source,
    found: Structure,
    plan: Plan,
    format: Format,
    staging: Staging,
    progress: Progress,
) -> list[LayerRow]:
    """Write every tensor of a source, transformed as planned.

    Returns:
        One row per layer for the report, those of steps that an earlier run finished included.
    """
    by_tensor: dict[str, list[Layer]] = {}
    for layer in found.layers.values():
        by_tensor.setdefault(layer.tensor, []).append(layer)
    steps = _steps(list(source.tensors.values()))
    progress.stage("transform", len(steps))
    rows: list[LayerRow] = []
    for infos in steps:
        rows += _step(source, infos, by_tensor, plan, format, staging)
        progress.step(infos[0].name)
    return rows


def _step(
    source: Source,
    infos: Sequence[TensorInfo],
    by_tensor: Mapping[str, Sequence[Layer]],
    plan: Plan,
    format: Format,
    staging: Staging,
) -> list[LayerRow]:
    """Write some tensors, unless an earlier run did."""
    if entry := staging.steps.get(infos[0].name):
        return [LayerRow.from_json(row) for row in entry["facts"]["rows"]]
    rows: list[LayerRow] = []
    for info in infos:
        layers = by_tensor.get(info.name, [])
        if any(plan.layers[layer.name].steps for layer in layers):
            rows += _transform_tensor(source, info, layers, plan, format, staging)
        else:
            for layer in layers:
                plan_of = plan.layers[layer.name]
                rows.append(LayerRow.untouched(layer, info, format.size(layer, plan_of, info)))
            copy_tensor(source, info, format, staging)
    staging.finish_step(infos[0].name, {"rows": [row.as_json() for row in rows]})
    return rows


def copy_tensor(source: Source, info: TensorInfo, format: Format, staging: Staging) -> None:
    """Write a tensor that no plan changes, in slices, unless the format has no use for it.

    Raises:
        UserError: It holds NaN or infinity.
    """
    kept = format.rest(info)
    if kept is None:
        return
    stored = kept.name
    if not info.shape or not info.count:
        staging.write(stored, format.encode_rest(info, source.read(info.name)))
        return
    rows = _multiple(_COPY_BYTES * info.shape[0] // info.size, format.together(info))
    for start in range(0, info.shape[0], rows):
        part = source.read(info.name, start, start + rows)
        if part.is_floating_point() and info.dtype.itemsize > 1:
            check_finite(info.name, part)
        staging.write(stored, format.encode_rest(info, part), start)


def _steps(tensors: Sequence[TensorInfo]) -> list[list[TensorInfo]]:
    steps: list[list[TensorInfo]] = [[]]
    for info in tensors:
        if steps[-1] and sum(i.size for i in steps[-1]) + info.size > _STEP_BYTES:
            steps.append([])
        steps[-1].append(info)
    return steps


def _transform_tensor(
    source: Source,
    info: TensorInfo,
    layers: Sequence[Layer],
    plan: Plan,
    format: Format,
    staging: Staging,
) -> list[LayerRow]:
    rows: list[LayerRow] = []
    whole = source.read(info.name)
    for layer in layers:
        matrix, layer_plan = layer.matrix(whole), plan.layers[layer.name]
        slices: list[Mapping[str, Tensor]] = []
        lost = energy = 0.0
        notes: dict[str, None] = {}
        kept = 0
        at_once = _rows_at_once(layer, layer_plan, format, info)
        with _threads(1) if at_once < layer.rows else contextlib.nullcontext():
            for weight in matrix.split(at_once):
                wide = weight.to(torch.float32, copy=True)
                done = transform([layer], [wide], {}, [layer_plan], plan.options)[0]
                slices.append(format.encode(done, info))
                lost += float(done.lost.sum())
                energy += float(done.energy.sum())
                kept += int(done.kept.sum()) if done.kept is not None else wide.numel()
                notes |= dict.fromkeys(done.notes)
        write_layer(layer, layer_plan, slices, format, staging)
        rows.append(
            LayerRow.of(
                layer,
                layer_plan,
                info,
                stored=format.size(layer, layer_plan, info),
                error=lost_share(lost, energy),
                density=kept / layer.count,
                notes=tuple(notes),
            )
        )
    return rows


@contextlib.contextmanager
def _threads(number: int) -> Generator[None]:
    """A slice is too small to share among threads: they would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_layer(
    layer: Layer,
    plan: LayerPlan,
    slices: Sequence[Mapping[str, Tensor]],
    format: Format,
    staging: Staging,
) -> None:
    """Write a layer that was encoded in slices of rows."""
    for name in slices[0]:
        tensor = torch.cat([part[name] for part in slices])
        if layer.expert is None:
            staging.write(name, tensor)
        else:
            staging.write(name, tensor[None], layer.expert)
    for name, tensor in format.constants(layer, plan).items():
        staging.write(name, tensor)


def _rows_at_once(layer: Layer, plan: LayerPlan, format: Format, info: TensorInfo) -> int:
    """Rows of a slice; all of them where a method or the format needs them together."""
    apart = all(catalogue.get(id).rows == "independent" for id, _ in plan.steps)
    if not apart or layer.layout == "conv1d" or format.whole(plan):
        return layer.rows
    return _multiple(SLICE_ENTRIES // layer.width, math.lcm(ROW_STEP, format.together(info)))


def _multiple(wanted: int, of: int) -> int:
    return max(of, wanted // of * of)
