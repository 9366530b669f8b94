"""Merging tensor by tensor, in slices: memory holds a few of these, whatever the models' size."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.keeping.staging import Staging
from layerwise.core.merging import exact
from layerwise.core.merging.blend import Blend, Setting
from layerwise.core.merging.noise import key_of
from layerwise.core.progress import Progress
from layerwise.core.reading.checkpoint import Source, TensorInfo
from layerwise.core.reading.entries import Reader
from layerwise.core.reading.parents import Parents
from layerwise.core.reading.structure import Layer, block_of, structure
from layerwise.core.running.apply import check_finite
from layerwise.core.running.stream import steps, threads
from layerwise.core.telling.merged import MergedRow

# Entries of one model that a method is given at once: in float32 those of all models should stay
# in the processor's cache while it works on them.
SLICE_ENTRIES = 1 << 16
# Entries of one model that are read at once.
RUN_ENTRIES = 1 << 20

# What a method that ties layers together is given or gives: tensors by name.
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Given:
    """Evidence about the models that their weights do not hold.

    Attributes:
        grams: For each model, in the order of the parents, mean of x x^T of what layers read.
        fishers: For each model mean squared gradients, under the names of its tensors.
        loss: What a model with such tensors loses.
        symmetries: What can be permuted without changing the function.
        moments: By tensor of a layer, mean products of all that it reads in all models.
        instead: Tensors of the result that are known already, and not merged.
    """

    grams: Sequence[Source] = ()
    fishers: Sequence[Source] = ()
    loss: Callable[[State], float] | None = None
    symmetries: Any = None
    moments: State = field(default_factory=dict[str, Tensor])
    instead: State = field(default_factory=dict[str, Tensor])


@dataclass
class Mixer:
    """Merges tensors of parents, for a `with` block.

    Attributes:
        found: The models.
        blend: How each tensor is merged.
        given: What else methods read.
        slice_entries: Entries that a method is given at once; no result depends on it.
    """

    found: Parents
    blend: Blend
    given: Given = field(default_factory=Given)
    slice_entries: int = SLICE_ENTRIES
    _readers: dict[int, Reader] = field(default_factory=dict[int, Reader])
    _buffers: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    _model_cuts: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __enter__(self) -> "Mixer":
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers.values():
            reader.__exit__(None, None, None)
        self._readers.clear()

    @functools.cached_property
    def layers(self) -> Mapping[str, list[Layer]]:
        """The layers that lie in each tensor, where the model's structure is known."""
        by_tensor: dict[str, list[Layer]] = {}
        with contextlib.suppress(UserError):
            for layer in structure(self.found.described).layers.values():
                by_tensor.setdefault(layer.tensor, []).append(layer)
        return by_tensor

    @functools.cached_property
    def state(self) -> State:
        """All that a method which ties layers together makes."""
        words = self.blend.merger.evidence
        all_given = {
            "networks": [_Held(self, one) for one in self.found.models],
            "origin": None if self.found.base is None else _Held(self, self.found.base),
            "symmetries": self.given.symmetries,
            "loss": self.given.loss,
            "moments": self.given.moments,
            "first": self.found.given.index(0),
            "shares": self._shares(next(iter(self.blend.settings.values())), self._all),
        }
        options = next(iter(self.blend.settings.values())).options
        made = self.blend.merger.run(**{word: all_given[word] for word in words}, **options)
        return cast("State", made)

    @property
    def _all(self) -> list[int]:
        return list(range(len(self.found.models)))

    def parts(
        self, name: str, setting: Setting | None = None
    ) -> Iterator[tuple[int, Float[Tensor, " _"], Callable[[int], Tensor | None]]]:
        """The merged tensor in slices as it lies in memory, in float32.

        Args:
            name: The tensor.
            setting: How to merge it, instead of as the blend says.

        Returns:
            Where each slice begins, the slice, and what reads the same slice of a parent: by its
            place among the models, -1 for the base; None for a parent without that tensor.

        Raises:
            UserError: A model holds NaN or infinity.
        """
        method, setting = self.blend.merger, setting or self.blend.settings[name]
        if name in self.given.instead:
            yield from self._cut(name, self.given.instead[name].float().reshape(-1))
        elif "networks" in method.evidence:
            merged = self.state[name].float().reshape(-1)
            yield from self._cut(name, merged)
        elif method.rows == "entry":
            yield from self._in_slices(name, setting)
        else:
            yield from self._cut(name, self._whole(name, setting))

    def tensor(self, name: str, setting: Setting | None = None) -> Tensor:
        """The merged tensor, whole, in float32."""
        info = self.found.tensors[name]
        made = torch.empty(info.count)
        for start, part, _ in self.parts(name, setting):
            made[start : start + len(part)] = part
        return made.reshape(info.shape)

    def _cut(
        self, name: str, merged: Tensor
    ) -> Iterator[tuple[int, Tensor, Callable[[int], Tensor | None]]]:
        for start in range(0, len(merged), self.slice_entries):
            part = merged[start : start + self.slice_entries]
            yield start, part, self._original(name, start, start + len(part))

    def _original(self, name: str, start: int, stop: int) -> Callable[[int], Tensor | None]:
        def read(place: int) -> Tensor | None:
            source = self.found.base if place < 0 else self.found.models[place]
            if source is None or name not in source.tensors:
                return None
            return self._reader(source).read(name, start, stop).float()

        return read

    def _in_slices(
        self, name: str, setting: Setting
    ) -> Iterator[tuple[int, Tensor, Callable[[int], Tensor | None]]]:
        method, places = self.blend.merger, self.found.of(name)
        constant = self._constant(name, setting, places)
        options = self._options(setting, places)
        for at, models, base in self._slices(name, places):
            width = models.shape[1]
            given = dict(constant)
            if "fishers" in method.evidence:
                given["fishers"] = self._fishers(name, places, at, at + width)
            if "entries" in method.evidence:
                given["entries"] = torch.arange(at, at + width)
            given |= {"models": models, "base": base}
            merged = method.run(**{word: given[word] for word in method.evidence}, **options)

            def original(
                place: int, models: Tensor = models, base: Tensor | None = base
            ) -> Tensor | None:
                if place < 0:
                    return base
                return models[places.index(place)] if place in places else None

            yield at, merged, original

    def _slices(
        self, name: str, places: Sequence[int]
    ) -> Iterator[tuple[int, Float[Tensor, "models _"], Tensor | None]]:
        """Slices of a tensor of some models, and of their base; good until the next is asked for.

        Raises:
            UserError: One holds NaN or infinity.
        """
        count = self.found.tensors[name].count
        readers = [self._of_model(place, name) for place in places]
        base = self.found.base
        based = None if base is None or name not in base.tensors else self._reader(base)
        for start in range(0, count, RUN_ENTRIES):
            stop = min(start + RUN_ENTRIES, count)
            raw = [reader.read(name, start, stop) for reader in readers]
            ground = None if based is None else based.read(name, start, stop)
            for at in range(0, stop - start, self.slice_entries):
                end = min(at + self.slice_entries, stop - start)
                models = self._buffer("models", len(places), end - at)
                for row, one in zip(models, raw, strict=True):
                    row.copy_(one[at:end])
                if not torch.isfinite(models.sum()):
                    for place, one in zip(places, raw, strict=True):
                        check_finite(f"{name} of {self.found.models[place].label}", one.float())
                part = None
                if ground is not None:
                    part = self._buffer("base", 1, end - at)[0].copy_(ground[at:end])
                    if not torch.isfinite(part.sum()):
                        check_finite(f"{name} of the base", part)
                yield start + at, models, part

    def _buffer(self, kind: str, rows: int, width: int) -> Tensor:
        """Room that is used again and again."""
        held = self._buffers.get(kind)
        if held is None or held.numel() < rows * width:
            held = self._buffers[kind] = torch.empty(rows * max(width, self.slice_entries))
        return held[: rows * width].view(rows, width)

    def _whole(self, name: str, setting: Setting) -> Tensor:
        """A tensor that its method must see in one piece, layer by layer; flat."""
        method, info, places = self.blend.merger, self.found.tensors[name], self.found.of(name)
        models = [self._of_model(place, name).whole(name).float() for place in places]
        for place, one in zip(places, models, strict=True):
            check_finite(f"{name} of {self.found.models[place].label}", one)
        base = self.found.base
        ground = None
        if base is not None and name in base.tensors:
            ground = self._reader(base).whole(name).float()
        options = self._options(setting, places)

        def run(stacked: Tensor, based: Tensor | None, layer: str) -> Tensor:
            given = {
                **self._constant(name, setting, places),
                "models": stacked,
                "base": based,
                "grams": self._grams(layer, places),
            }
            return method.run(**{word: given[word] for word in method.evidence}, **options)

        made = torch.empty(info.shape)
        for layer in self.layers.get(name, []):
            matrices = torch.stack([layer.matrix(one) for one in models])
            based = None if ground is None else layer.matrix(ground)
            layer.matrix(made).copy_(run(matrices, based, layer.name))
        if not self.layers.get(name):
            made = run(torch.stack(models), ground, "")
        return made.reshape(-1)

    def _constant(self, name: str, setting: Setting, places: Sequence[int]) -> dict[str, Any]:
        """What is the same for all slices of a tensor."""
        words = self.blend.merger.evidence
        if "base" in words and (self.found.base is None or name not in self.found.base.tensors):
            raise UserError(
                f"{self.blend.merger.id} needs a base"
                + (f", and {name} is not in it." if self.found.base else "."),
                "Give the model that the others were tuned from with --base.",
            )
        made: dict[str, Any] = {"shares": self._shares(setting, places)}
        if "seeds" in words:
            made["seeds"] = [key_of(name, self.found.digests[place]) for place in places]
        if "products" in words:
            slices = (models for _, models, _ in self._slices(name, places))
            made["products"] = exact.products(slices, len(places))
        if "cuts" in words:
            made["cuts"] = self._cuts(name, setting, places)
        return made

    def _shares(self, setting: Setting, places: Sequence[int]) -> Tensor:
        given = self.found.ordered(list(setting.shares))
        return torch.tensor([given[place] for place in places])

    def _options(self, setting: Setting, places: Sequence[int]) -> dict[str, Any]:
        """Options as the method takes them: lists are in the order of the parents."""
        made: dict[str, Any] = {}
        for name, value in setting.options.items():
            if isinstance(value, Sequence) and not isinstance(value, str):
                if len(value) != len(self.found.models):
                    raise UserError(
                        f"{name} has {len(value)} values for {len(self.found.models)} models.",
                        "Give one, or one for each model.",
                    )
                ordered = self.found.ordered(list(value))
                made[name] = [ordered[place] for place in places]
            else:
                made[name] = value
        return made

    def _cuts(self, name: str, setting: Setting, places: Sequence[int]) -> Tensor:
        """From which magnitude on differences are kept, in the scope that the setting says."""
        names = [name]
        if self._option(setting, "scope") == "model":
            names = [one for one, info in self.found.tensors.items() if _mixed(info)]
        density = self._options(setting, self._all).get("density", self._default("density"))
        listed = list(density) if isinstance(density, Sequence) else [density] * len(self._all)
        if not all(0 <= one <= 1 for one in listed):
            raise UserError(f"a density of {density} is not possible.", "Give one from 0 to 1.")
        asked = f"{names[0]} {len(names)} {listed}"
        if asked not in self._model_cuts:
            size = sum(self.found.tensors[one].count for one in names)
            kept = [_rank(one, size) for one in listed]

            def parts() -> Iterator[Tensor]:
                for one in names:
                    yield from self._differences(one)

            everything = all(rank >= size for rank in kept)
            made = torch.zeros(len(kept)) if everything else exact.cuts(parts, kept)
            if len(names) == 1:
                return made[list(places)]
            self._model_cuts[asked] = made
        return self._model_cuts[asked][list(places)]

    def _differences(self, name: str) -> Iterator[Tensor]:
        """Slices of every model's difference from the base; 0.0 where a model lacks the tensor."""
        places = self.found.of(name)
        for _, models, base in self._slices(name, places):
            if base is None:
                continue
            models.sub_(base)  # the buffer is filled anew for each slice
            if len(places) == len(self._all):
                yield models
            else:
                full = models.new_zeros(len(self._all), models.shape[1])
                full[places] = models
                yield full

    def _option(self, setting: Setting, name: str) -> Any:
        return setting.options.get(name, self._default(name))

    def _default(self, name: str) -> Any:
        options = self.blend.merger.options
        return options[name].default if name in options else None

    def _grams(self, layer: str, places: Sequence[int]) -> Tensor | None:
        if not layer or not all(layer in self.given.grams[place].tensors for place in places):
            return None
        return torch.stack([self.given.grams[place].read(layer) for place in places])

    def _fishers(self, name: str, places: Sequence[int], start: int, stop: int) -> Tensor | None:
        sources = [self.given.fishers[place] for place in places]
        if not all(name in one.tensors for one in sources):
            return None
        return torch.stack([self._reader(one).read(name, start, stop) for one in sources])

    def _of_model(self, place: int, name: str) -> Reader:
        """What reads a model's tensor; the base's, where that stands in for one it lacks."""
        model = self.found.models[place]
        if name not in model.tensors:
            assert self.found.base is not None
            model = self.found.base
        return self._reader(model)

    def _reader(self, source: Source) -> Reader:
        return self._readers.setdefault(id(source), Reader(source))


class _Held(Mapping[str, Tensor]):
    """A model's tensors of floats by name, read whole and in float32 when they are asked for."""

    def __init__(self, mixer: Mixer, source: Source) -> None:
        self._mixer = mixer
        self._source = source
        self._names = [n for n, info in mixer.found.tensors.items() if _mixed(info)]

    def __getitem__(self, name: str) -> Tensor:
        source = self._source if name in self._source.tensors else self._mixer.found.base
        if source is None or name not in source.tensors:
            raise KeyError(name)
        found = self._mixer._reader(source).whole(name).float()  # pyright: ignore[reportPrivateUsage]
        check_finite(f"{name} of {source.label}", found)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _mixed(info: TensorInfo) -> bool:
    """Whether a tensor holds numbers to average; whole numbers are copied."""
    return info.dtype.is_floating_point and info.count > 0


def _rank(density: float, size: int) -> int:
    """How many entries are kept; one at least, unless none is to be."""
    return max(1, round(density * size)) if density else 0


def mix(
    mixer: Mixer, staging: Staging, outputs: Mapping[str, TensorInfo], progress: Progress
) -> list[MergedRow]:
    """Write every tensor of the result, in steps that a stopped run does not repeat.

    Args:
        mixer: Merges.
        staging: Where the result is made.
        outputs: Every tensor as it will be stored.
        progress: Is told of each step.

    Returns:
        One row for each tensor, those of steps that an earlier run finished included.
    """
    todo = steps(list(outputs.values()))
    progress.stage("merge", len(todo))
    rows: list[MergedRow] = []
    with threads(1):
        for infos in todo:
            first = infos[0].name
            entry = staging.steps.get(first)
            if entry is None:
                done = [_write(mixer, info, staging) for info in infos]
                staging.finish_step(first, {"rows": [_as_json(row) for row in done]})
            else:
                done = [MergedRow(**row) for row in entry["facts"]["rows"]]
            rows += done
            progress.step(first)
    return rows


def _as_json(row: MergedRow) -> dict[str, Any]:
    return {name: getattr(row, name) for name in MergedRow.__slots__}


def _write(mixer: Mixer, info: TensorInfo, staging: Staging) -> MergedRow:
    """Merge one tensor and write it."""
    found, setting = mixer.found, mixer.blend.settings[info.name]
    if not _mixed(found.tensors[info.name]):
        return _copied(mixer, info, staging)
    sums = _Distances(len(found.models))
    for start, part, original in mixer.parts(info.name):
        sums.see(part, original)
        stored = part.to(info.dtype)
        # Narrower floats than float32 may overflow where it does not.
        if not torch.isfinite(stored.sum()):
            check_finite(f"what {info.name} becomes", stored.float())
        staging.write_entries(info.name, stored, start)
    distances, from_base = sums.relative()
    back = {place: n for n, place in enumerate(found.given)}
    absent = [one.label for one in found.absent.get(info.name, ())]
    note = f"not in {', '.join(absent)}" if absent else ""
    if info.name in mixer.given.instead:
        note = "taken anew of the result"
    return MergedRow(
        info.name,
        list(info.shape),
        block_of(info.name),
        mixer.blend.method,
        list(setting.shares),
        dict(setting.options),
        [distances[back[place]] for place in range(len(back))],
        from_base if found.base is not None else None,
        note,
    )


def _copied(mixer: Mixer, info: TensorInfo, staging: Staging) -> MergedRow:
    """Whole numbers, and what is empty, are those of the base or of the first model."""
    found = mixer.found
    holders = [one for one in [found.base, *found.models] if one and info.name in one.tensors]
    kept = holders[0].read(info.name)
    staging.write_entries(info.name, kept.reshape(-1), 0)
    differs = any(not torch.equal(kept, one.read(info.name)) for one in holders[1:])
    note = f"not averaged: {holders[0].label}'s" + ", others differ" * differs
    lacking: list[float | None] = [None for _ in found.models]
    return MergedRow(
        info.name, list(info.shape), block_of(info.name), "copy", [], {}, lacking, None, note
    )


class _Distances:
    """Adds up how far a merged tensor is from its parents'."""

    def __init__(self, models: int) -> None:
        self._apart = [0.0] * (models + 1)  # the base's last
        self._whole = [0.0] * (models + 1)
        self._there = [False] * (models + 1)

    def see(self, merged: Tensor, original: Callable[[int], Tensor | None]) -> None:
        """Take in a slice."""
        for place in range(-1, len(self._apart) - 1):
            there = original(place)
            if there is not None:
                apart = merged - there
                self._apart[place] += float(torch.dot(apart, apart))
                self._whole[place] += float(torch.dot(there, there))
                self._there[place] = True

    def relative(self) -> tuple[list[float | None], float | None]:
        """The distances to the models, and that to the base."""
        found = [
            (math.sqrt(apart / whole) if whole else math.sqrt(apart)) if there else None
            for apart, whole, there in zip(self._apart, self._whole, self._there, strict=True)
        ]
        return found[:-1], found[-1]
