"""Weight-only work: tensors are read and written one at a time, and the model is never built.

Memory holds a few slices of rows where the plan's methods treat rows apart, and one layer in
float32 where they do not.
"""

import contextlib
import math
from collections.abc import Generator, Mapping, Sequence

import torch
from torch import Tensor

from layerwise.core import catalogue
from layerwise.core.economy import LAVISH, READ_BYTES, Economy
from layerwise.core.format import Format
from layerwise.core.keeping.staging import Staging
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.progress import Progress
from layerwise.core.reading.checkpoint import Source, TensorInfo
from layerwise.core.reading.structure import Layer, Structure
from layerwise.core.running.apply import check_finite, lost_share, transform
from layerwise.core.telling.outcome import LayerRow

# A slice in float32 should stay in the processor's cache while a method works on it.
SLICE_ENTRIES = 1 << 18
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
    economy: Economy = LAVISH,
) -> list[LayerRow]:
    """Write every tensor of a source, transformed as planned.

    Returns:
        One row per layer for the report, those of steps that an earlier run finished included.
    """
    by_tensor: dict[str, list[Layer]] = {}
    for layer in found.layers.values():
        by_tensor.setdefault(layer.tensor, []).append(layer)
    todo = steps(list(source.tensors.values()))
    progress.stage("transform", len(todo))
    rows: list[LayerRow] = []
    for infos in todo:
        rows += _step(source, infos, by_tensor, plan, format, staging, economy.read_bytes)
        progress.step(infos[0].name)
    return rows


def _step(
    source: Source,
    infos: Sequence[TensorInfo],
    by_tensor: Mapping[str, Sequence[Layer]],
    plan: Plan,
    format: Format,
    staging: Staging,
    read_bytes: int,
) -> list[LayerRow]:
    """Write some tensors, unless an earlier run did."""
    if entry := staging.steps.get(infos[0].name):
        return [LayerRow.from_json(row) for row in entry["facts"]["rows"]]
    rows: list[LayerRow] = []
    for info in infos:
        layers = by_tensor.get(info.name, [])
        if any(plan.layers[layer.name].steps for layer in layers):
            rows += _transform_tensor(source, info, layers, plan, format, staging, read_bytes)
        else:
            for layer in layers:
                plan_of = plan.layers[layer.name]
                rows.append(LayerRow.untouched(layer, info, format.size(layer, plan_of, info)))
            copy_tensor(source, info, format, staging, read_bytes)
    staging.finish_step(infos[0].name, {"rows": [row.as_json() for row in rows]})
    return rows


def copy_tensor(
    source: Source,
    info: TensorInfo,
    format: Format,
    staging: Staging,
    read_bytes: int = READ_BYTES,
) -> None:
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
    rows = _multiple(read_bytes * info.shape[0] // info.size, format.together(info))
    for start in range(0, info.shape[0], rows):
        part = source.read(info.name, start, start + rows)
        if part.is_floating_point() and info.dtype.itemsize > 1:
            check_finite(info.name, part)
        staging.write(stored, format.encode_rest(info, part), start)
        del part  # before the next is read


def steps(tensors: Sequence[TensorInfo]) -> list[list[TensorInfo]]:
    """Tensors in runs that are finished, and recorded, together."""
    made: list[list[TensorInfo]] = [[]]
    for info in tensors:
        if made[-1] and sum(i.size for i in made[-1]) + info.size > _STEP_BYTES:
            made.append([])
        made[-1].append(info)
    return made


def _transform_tensor(
    source: Source,
    info: TensorInfo,
    layers: Sequence[Layer],
    plan: Plan,
    format: Format,
    staging: Staging,
    read_bytes: int,
) -> list[LayerRow]:
    rows: list[LayerRow] = []
    for layer in layers:
        layer_plan = plan.layers[layer.name]
        writer = LayerWriter(layer, layer_plan, format, staging)
        lost = energy = 0.0
        notes: dict[str, None] = {}
        kept = 0
        at_once = rows_at_once(layer, layer_plan, format, info)
        with threads(1) if at_once < layer.rows else contextlib.nullcontext():
            for weight in _slices(source, layer, at_once, read_bytes):
                done = transform([layer], [weight], {}, [layer_plan], plan.options)[0]
                writer.write(format.encode(done, info))
                lost += float(done.lost.sum())
                energy += float(done.energy.sum())
                kept += int(done.kept.sum()) if done.kept is not None else weight.numel()
                notes |= dict.fromkeys(done.notes)
        writer.finish()
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


def _slices(source: Source, layer: Layer, at_once: int, read_bytes: int) -> Generator[Tensor]:
    """A layer's matrix in float32, so many rows at a time, read a few slices at a time."""
    chunk = at_once * max(1, read_bytes // (4 * at_once * layer.width))
    for start in range(0, layer.rows, chunk):
        read = [*layer.read(source, start, min(start + chunk, layer.rows)).split(at_once)]
        while read:
            yield read.pop(0).float()


@contextlib.contextmanager
def threads(number: int) -> Generator[None]:
    """A slice is too small to share among threads: they would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class LayerWriter:
    """Writes a layer that is encoded in slices of rows, each as soon as it is there."""

    def __init__(self, layer: Layer, plan: LayerPlan, format: Format, staging: Staging) -> None:
        self.layer = layer
        self.plan = plan
        self.format = format
        self.staging = staging
        self._rows: dict[str, int] = {}

    def write(self, encoded: Mapping[str, Tensor]) -> None:
        """Write the next rows."""
        for name, rows in encoded.items():
            self.staging.write(name, rows, self._rows.get(name, 0), self.layer.expert)
            self._rows[name] = self._rows.get(name, 0) + len(rows)

    def finish(self) -> None:
        """Write what the weights have no part in."""
        for name, tensor in self.format.constants(self.layer, self.plan).items():
            self.staging.write(name, tensor)


def rows_at_once(layer: Layer, plan: LayerPlan, format: Format, info: TensorInfo) -> int:
    """Rows of a slice; all of them where a method or the format needs them together."""
    apart = all(catalogue.get(id).rows == "independent" for id, _ in plan.steps)
    if not apart or layer.layout == "conv1d" or format.whole(plan):
        return layer.rows
    return _multiple(SLICE_ENTRIES // layer.width, math.lcm(ROW_STEP, format.together(info)))


def _multiple(wanted: int, of: int) -> int:
    return max(of, wanted // of * of)
