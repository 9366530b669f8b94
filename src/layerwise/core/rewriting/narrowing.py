"""Make a model really smaller: take units out of its blocks, or whole blocks out of it.

A `Joint` is where units can go: some layers of one block make channels, one layer reads them.
With units go rows of the makers (of their weights and biases), columns of the reader, and settings
of the configuration.  Which layers those are is data in core/reading/families.py.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.packing import raw_bytes
from layerwise.core.reading.checkpoint import Source, TensorInfo
from layerwise.core.reading.families import FAMILIES, Seam
from layerwise.core.reading.structure import Layer, Structure
from layerwise.core.results import Narrowed
from layerwise.core.rewriting.rewriting import Axis, Change, Erase, Rewritten, Take, head_size

# Widths of this many channels and more stay divisible by it, as products on most processors like.
MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Joint:
    """A seam of one block, and the layers on its two sides.

    Attributes:
        seam: What holds in every block.
        makers: Layers whose rows are the channels.
        reader: The layer whose columns they are.
        units: Equal runs that the channels lie in.
        channels: How many channels are read.
    """

    seam: Seam
    makers: tuple[Layer, ...]
    reader: Layer
    units: int
    channels: int

    @property
    def cost(self) -> int:
        """Weights that one unit takes."""
        return (sum(one.count for one in self.makers) + self.reader.count) // self.units

    def columns(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "outputs channels"]:
        """The reader's weight with one column for each channel: kernels lie below each other."""
        shaped = weight.reshape(len(weight), self.channels, -1)  # (out, channels, kernel)
        return shaped.transpose(1, 2).flatten(0, 1).contiguous()

    def whole(self, columns: Float[Tensor, "outputs channels"]) -> Float[Tensor, "out in"]:
        """What `columns` was made of."""
        shaped = columns.unflatten(0, (self.reader.rows, -1))  # (out, kernel, channels)
        return shaped.transpose(1, 2).flatten(1).contiguous()


def joints(source: Source, found: Structure) -> list[Joint]:
    """Where units can be taken out of a model, block by block.

    Raises:
        UserError: Nowhere; or what the layers hold is not what the configuration says.
    """
    made: list[Joint] = []
    for reader in found.layers.values():
        inside = reader.name.removeprefix(f"{reader.block}.")
        number = re.search(r"experts\.(\d+)\.", inside)
        pattern = inside.replace(number[0], "experts.{}.") if number else inside
        for seam in found.family.seams:
            if pattern != seam.reader:
                continue
            names = [f"{reader.block}.{one.format(number and number[1])}" for one in seam.makers]
            makers = tuple(found.layers[name] for name in names if name in found.layers)
            if len(makers) == len(names):
                made.append(_joint(source, seam, makers, reader))
    if not made:
        kind = source.config.get("model_type") or "model of unknown type"
        known = sorted({kind for one in FAMILIES if one.seams for kind in one.types})
        raise UserError(
            f"{source.label} is a {kind}, of which it is not known where units can be taken out.",
            f"Leave --narrow out; it works on {', '.join(known)}, and on convolutions that are "
            "named as in torchvision.",
        )
    return made


def _joint(source: Source, seam: Seam, makers: tuple[Layer, ...], reader: Layer) -> Joint:
    shape = source.tensors[reader.tensor].shape
    channels = shape[1] if reader.layout == "convolution" else reader.width
    units = min(maker.rows for maker in makers) // seam.parts
    if seam.heads:
        units //= head_size(source)
    cut = [maker.rows // seam.parts for maker in makers] + [channels]
    if units < 1 or any(size % units for size in cut) or (not seam.heads and channels != units):
        raise UserError(
            f"{reader.name} reads {channels} channels that "
            f"{', '.join(f'{maker.name} ({maker.rows} rows)' for maker in makers)} are to make, "
            f"which are not {units} equal units.",
            "Leave --narrow out: its blocks are of another kind than its config.json says.",
        )
    return Joint(seam, makers, reader, units, channels)


def by_seam(all: Sequence[Joint]) -> dict[Seam, list[Joint]]:
    """Joints whose widths one configuration says."""
    made: dict[Seam, list[Joint]] = {}
    for joint in all:
        made.setdefault(joint.seam, []).append(joint)
    return made


def spendable(all: Sequence[Joint], found: Structure, keep: float) -> int:
    """Weights that units may take when a fraction of those of all layers stays.

    Raises:
        UserError: That is less than one unit in each place.
    """
    total = sum(layer.count for layer in found.layers.values())
    beside = total - sum(joint.cost * joint.units for joint in all)
    least = beside + sum(joint.cost for joint in all)
    if not 0 < keep <= 1:
        raise UserError(f"keep is {keep}.", "Give the fraction of weights to keep, in (0, 1].")
    if keep * total < least:
        raise UserError(
            f"keeping {keep:.3g} of the weights would leave a layer without channels.",
            f"One unit of each layer and what is not cut are {least / total:.3g}: keep more.",
        )
    return int(keep * total) - beside


def shared_widths(
    source: Source, all: Sequence[Joint], scores: Mapping[str, Tensor], budget: int
) -> tuple[dict[str, int], list[str]]:
    """How many units each joint keeps if those of one seam keep as many, by the reader's name.

    A threshold over the scores of all units says how many each seam would keep on average.  Heads
    get the number closest to that which the configuration allows; channels share what is left.

    Args:
        source: The model.
        all: Its joints.
        scores: Of each unit, by the reader's name.
        budget: Weights that all units that stay may take.

    Returns:
        The widths, and what the reader of a report should know of them.

    Raises:
        UserError: Layers of one seam have different widths now, or no widths fit.
    """
    seams = by_seam(all)
    for seam, members in seams.items():
        if len({joint.units for joint in members}) > 1:
            raise UserError(
                f"the layers {seam.reader} of {source.label} have different widths, and its "
                "configuration has one number for all.",
                "Give --widths own, which zeroes units instead.",
            )
    free = own_widths(all, scores, budget)[0]
    wanted = {seam: _mean([free[j.reader.name] for j in js]) for seam, js in seams.items()}
    heads = [seam for seam in seams if seam.heads]
    rest = [seam for seam in seams if not seam.heads]
    prices = {seam: sum(joint.cost for joint in members) for seam, members in seams.items()}
    most = {seam: members[0].units for seam, members in seams.items()}
    tried = [_allowed(source, seams[seam][0]) for seam in heads]
    fits = [
        (sum(abs(n - wanted[s]) for s, n in zip(heads, ns, strict=True)), ns, widths)
        for ns in itertools.product(*tried)
        if (
            widths := _filled(
                rest, wanted, most, prices, budget - _price(zip(heads, ns, strict=True), prices)
            )
        )
        is not None
    ]
    if not fits:
        raise UserError(
            f"no widths that all blocks share fit what {source.label} is to keep.",
            "Keep more, or give --widths own, which zeroes units instead.",
        )
    # Of the closest, the one that leaves least of what there is to spend.
    near = min(distance for distance, _, _ in fits)
    chosen = max(
        (dict(zip(heads, ns, strict=True)) | widths for d, ns, widths in fits if d == near),
        key=lambda widths: _price(widths.items(), prices),
    )
    notes = [
        f"{most[seam]} groups of heads in each block would have become {wanted[seam]:.3g} if any "
        f"number could be: transformers loads a {source.config.get('model_type')} only with heads "
        f"that divide its {seam.divides}, so {chosen[seam]} stay"
        for seam in heads
        if seam.divides and abs(chosen[seam] - wanted[seam]) >= 0.5
    ]
    return {joint.reader.name: chosen[joint.seam] for joint in all}, notes


def own_widths(
    all: Sequence[Joint], scores: Mapping[str, Tensor], budget: int
) -> tuple[dict[str, int], list[str]]:
    """How many units each joint keeps when those of all compete: the highest scores that fit.

    One unit of each stays, whatever its score; the notes say where.
    """
    kept = {joint.reader.name: 1 for joint in all}
    left = budget - sum(joint.cost for joint in all)
    others: list[tuple[float, int]] = []
    for place, joint in enumerate(all):
        ordered = scores[joint.reader.name].sort(descending=True).values.tolist()
        others += [(score, place) for score in ordered[1:]]
    # Equal scores: the earlier layer first, as within a layer.
    for _, place in sorted(others, key=lambda one: (-one[0], one[1])):
        joint = all[place]
        if joint.cost > left:
            break
        left -= joint.cost
        kept[joint.reader.name] += 1
    last = [name for name, count in kept.items() if count == 1]
    note = f"one unit stays in {', '.join(last)}: a layer without any would be none"
    return kept, [note] if last else []


def _allowed(source: Source, joint: Joint) -> list[int]:
    """How many units a seam may keep, of as many as it has."""
    if not joint.seam.divides:
        return list(range(1, joint.units + 1))
    of = int(source.config[joint.seam.divides])
    each = max(maker.rows for maker in joint.makers) // joint.units // head_size(source)
    # What does not divide now is loaded somehow: it may stay.
    return [n for n in range(1, joint.units + 1) if of % (n * each) == 0 or n == joint.units]


def _filled(
    seams: Sequence[Seam],
    wanted: Mapping[Seam, float],
    most: Mapping[Seam, int],
    prices: Mapping[Seam, int],
    budget: int,
) -> dict[Seam, int] | None:
    """Widths in the ratio of those wanted that take no more than a budget; None if none do."""

    def scaled(by: float) -> dict[Seam, int]:
        return {seam: _rounded(wanted[seam] * by, most[seam]) for seam in seams}

    low, high = 0.0, max((most[seam] / wanted[seam] for seam in seams), default=1.0)
    if _price(scaled(low).items(), prices) > budget:
        return None
    if _price(scaled(high).items(), prices) <= budget:
        return scaled(high)
    for _ in range(64):
        middle = (low + high) / 2
        if _price(scaled(middle).items(), prices) <= budget:
            low = middle
        else:
            high = middle
    return scaled(low)


def _rounded(width: float, most: int) -> int:
    """A width not above another, divisible by `MULTIPLE` if that is and there are so many."""
    width = min(most, int(width + 1e-9))
    if most % MULTIPLE == 0 and width >= MULTIPLE:
        width -= width % MULTIPLE
    return max(1, width)


def _price(widths: Any, prices: Mapping[Seam, int]) -> int:
    return sum(count * prices[seam] for seam, count in widths)


def _mean(counts: Sequence[int]) -> float:
    return sum(counts) / len(counts)


def narrowed(
    source: Source,
    found: Structure,
    all: Sequence[Joint],
    cuts: Mapping[str, Narrowed],
    *,
    zeroed: bool,
    told: str,
    notes: Sequence[str],
) -> Rewritten:
    """The model without the units that some cuts take out.

    Args:
        source: The model.
        found: Its structure.
        all: Its joints.
        cuts: What stays of each, by the reader's name.
        zeroed: Zero what goes instead of leaving it out.
        told: What was asked for.
        notes: What the reader of a report should know.
    """
    making = _Narrowing(source, found, zeroed)
    for joint in all:
        making.cut(joint, cuts[joint.reader.name])
    for members in by_seam(all).values():
        making.bias(members, cuts)
    digest = hashlib.sha256(told.encode())
    for joint in all:
        cut = cuts[joint.reader.name]
        digest.update(raw_bytes(cut.kept))
        digest.update(raw_bytes(cut.bias))
    return Rewritten(
        source,
        making.changes,
        list(making.added.values()),
        making.settings(all, cuts),
        digest.hexdigest(),
        [*notes, *_told(all, cuts, zeroed=zeroed), *making.notes],
    )


class _Narrowing:
    """Collects what becomes of tensors and settings."""

    def __init__(self, source: Source, found: Structure, zeroed: bool) -> None:
        self.source = source
        self.found = found
        self.zeroed = zeroed
        self.changes: dict[str, Change] = {}
        self.added: dict[str, TensorInfo] = {}
        self.notes: list[str] = []
        self.biased: set[str] = set()

    def cut(self, joint: Joint, cut: Narrowed) -> None:
        """Take the rows of the makers and the columns of the reader."""
        for maker in joint.makers:
            rows = _entries(cut.kept, maker.rows, joint.seam.parts)
            for name in (maker.tensor, f"{maker.name}.bias"):
                if name in self.source.tensors:
                    turned = name == maker.tensor and maker.layout == "conv1d"
                    self._take(name, "columns" if turned else "rows", rows)
        reader = joint.reader
        if cut.weight is not None:
            whole = reader.store(cut.weight, self.source.tensors[reader.tensor].shape)
            self.changes[reader.tensor] = Change(fill=whole)
        columns = _entries(cut.kept, joint.channels)
        self._take(reader.tensor, "rows" if reader.layout == "conv1d" else "columns", columns)

    def _take(self, name: str, axis: Axis, kept: Bool[Tensor, " entries"]) -> None:
        change, info = self.changes.get(name, Change()), self.source.tensors[name]
        if self.zeroed:
            erased = (*change.steps, Erase(axis, ~kept))
            self.changes[name] = replace(change, steps=erased)
            return
        index = kept.nonzero().flatten()
        shape = list(self.added.get(name, info).shape)
        shape[0 if axis == "rows" else 1] = len(index)
        self.added[name] = replace(info, shape=tuple(shape))
        if axis == "rows":
            self.changes[name] = replace(change, rows=index)
        else:
            self.changes[name] = replace(change, steps=(*change.steps, Take(index)))

    def bias(self, members: Sequence[Joint], cuts: Mapping[str, Narrowed]) -> None:
        """Give the readers of a seam what stands in for their units, if there is a place for it."""
        seam = members[0].seam
        lost = {joint.reader.name: cuts[joint.reader.name].bias for joint in members}
        if not any(bool(one.any()) for one in lost.values()):
            return
        here = [j for j in members if f"{j.reader.name}.bias" in self.source.tensors]
        if len(here) < len(members) and not seam.biases:
            kind = self.source.config.get("model_type") or "model of this kind"
            self.notes.append(
                f"a {kind} has no place for a bias of {seam.reader}: what units that are gone gave "
                "on average is lost"
            )
            return
        for joint in members:
            name = f"{joint.reader.name}.bias"
            before = self.source.read(name).float() if joint in here else 0.0
            info = self.source.tensors[joint.reader.tensor]
            self.changes[name] = Change(fill=before + lost[joint.reader.name])
            self.added[name] = TensorInfo(name, info.dtype, (joint.reader.rows,))
            if joint not in here:
                self.biased.add(seam.biases)
                for maker in joint.makers:
                    self._no_bias(f"{maker.name}.bias", maker)

    def _no_bias(self, name: str, maker: Layer) -> None:
        """A bias of zeros: one setting gives all layers of a seam their biases."""
        if name not in self.source.tensors:
            info = self.added.get(maker.tensor, self.source.tensors[maker.tensor])
            self.changes[name] = Change(fill=0.0)
            self.added[name] = TensorInfo(name, info.dtype, info.shape[:1])

    def settings(self, all: Sequence[Joint], cuts: Mapping[str, Narrowed]) -> dict[str, Any]:
        """Entries of `config.json` that say the new widths."""
        made: dict[str, Any] = dict.fromkeys(sorted(self.biased), True)
        if self.zeroed:
            return made
        for seam, members in by_seam(all).items():
            joint, count = members[0], int(cuts[members[0].reader.name].kept.sum())
            if not seam.heads:
                made |= dict.fromkeys(seam.units, count)
                continue
            size = head_size(self.source)
            shared, asking = seam.units
            each = joint.makers[0].rows // size // joint.units
            made |= {asking: count * each, shared: count, "head_dim": size}
        return made


def _entries(kept: Bool[Tensor, " units"], length: int, parts: int = 1) -> Bool[Tensor, " entries"]:
    """Which entries of an axis stay, of as many equal runs as there are units in each part."""
    return kept.repeat_interleave(length // parts // len(kept)).repeat(parts)


def _told(all: Sequence[Joint], cuts: Mapping[str, Narrowed], *, zeroed: bool) -> Iterator[str]:
    for seam, members in by_seam(all).items():
        counts = [int(cuts[joint.reader.name].kept.sum()) for joint in members]
        before = sorted({joint.units for joint in members})
        what = "groups of heads" if seam.heads else "channels"
        least, most = min(counts), max(counts)
        now = f"{least}" if least == most else f"{least} to {most}"
        if least == before[-1]:
            yield f"{seam.reader} reads all of its {before[-1]} {what}"
            continue
        how = "; the others are zeros, and files stay as large" if zeroed else ""
        was = " to ".join(str(one) for one in dict.fromkeys((before[0], before[-1])))
        yield f"{seam.reader} reads {now} {what} instead of {was}{how}"


def blocks_dropped(
    source: Source,
    found: Structure,
    scores: Mapping[str, float],
    count: int,
    described: Mapping[str, Any],
) -> Rewritten:
    """The model without its least important blocks, the others numbered anew.

    Args:
        source: The model.
        found: Its structure.
        scores: Of each block; higher is more important.
        count: How many go.
        described: All settings of the model, those included that its files leave to defaults.

    Raises:
        UserError: It has no such blocks, too few, or some whose nature hangs on their number.
    """
    family, blocks = found.family, [block for block in found.blocks if block]
    stems = {block.rpartition(".")[0] for block in blocks}
    depth = family.depth if described.get(family.depth) == len(blocks) else ""
    kind = source.config.get("model_type") or "model of unknown type"
    if not depth or len(stems) != 1:
        raise UserError(
            f"{source.label} is a {kind}, of which it is not known how blocks can be taken out.",
            "Leave --drop-blocks out.",
        )
    if not 0 < count < len(blocks):
        raise UserError(
            f"{count} of {len(blocks)} blocks are to go.",
            f"Drop from 1 to {len(blocks) - 1}: a model keeps one at least.",
        )
    for name, alike in family.placed:
        if described.get(name, alike) not in (alike, None):
            raise UserError(
                f"{source.label} has {name} = {described[name]!r}: what its blocks are hangs on "
                "their numbers.",
                "Leave --drop-blocks out.",
            )
    # Of equal blocks, the later goes.
    order = sorted(range(len(blocks)), key=lambda place: (scores[blocks[place]], -place))
    gone = set(order[:count])
    kept = [place for place in range(len(blocks)) if place not in gone]
    (stem,) = stems
    names = {f"{stem}.{new}": blocks[old] for new, old in enumerate(kept)}
    changes: dict[str, Change] = {}
    added: list[TensorInfo] = []
    left = {name for name in source.tensors if any(name.startswith(f"{b}.") for b in blocks)}
    for new, old in names.items():
        for info in source.tensors.values():
            if info.name.startswith(f"{old}."):
                name = new + info.name.removeprefix(old)
                changes[name] = Change(of=info.name)
                added.append(replace(info, name=name))
    left -= {info.name for info in added}
    listed = {
        name: [value[place] for place in kept]
        for name, value in described.items()
        if "layer" in name and isinstance(value, list) and len(value) == len(blocks)
    }
    told = f"blocks {sorted(gone)}"
    shown = ", ".join(f"{blocks[place]} ({scores[blocks[place]]:.3g})" for place in sorted(gone))
    return Rewritten(
        source,
        changes,
        added,
        {depth: len(kept), **listed},
        hashlib.sha256(told.encode()).hexdigest(),
        [f"{len(blocks) - len(kept)} of {len(blocks)} blocks went: {shown}"],
        frozenset(left),
        names,
    )
