"""Evidence of a model and another, and of a model on what is not the calibration text itself."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from layerwise.core.catalogue import PAIRED, UNLIKE
from layerwise.core.errors import UserError
from layerwise.core.progress import Progress
from layerwise.core.reading.checkpoint import Source
from layerwise.core.reading.structure import Layer, Structure, structure
from layerwise.core.running.ablation import ABLATED_WINDOWS, Answers
from layerwise.core.running.apply import check_finite
from layerwise.core.running.carried import Activations, Shelf
from layerwise.core.running.curvature import Curvature
from layerwise.core.running.curve import along, bent
from layerwise.core.running.evidence import AttentionMaps
from layerwise.core.running.fisher import answered, foretells, loss_gradient, seen_by_blocks
from layerwise.core.running.runner import Runner
from layerwise.core.running.tangents import tangents
from layerwise.flow.apart import Apart
from layerwise.flow.preparing import Prepared

# Evidence by word, and then by layer or, for measures of blocks, block.
Told = Mapping[str, Mapping[str, Any]]
# What no walk through one model shows.
BEFOREHAND = PAIRED | {
    *("disturbed", "hessian", "tangents"),
    *("echoes", "erased", "attributions", "later_states"),
}

# What is said of the loss on the way between two models.
_PATHS = {"ends", "path", "growing_path", "deep_path", "random_path"}
# Tokens of the calibration text (or pictures) that a loss is found on, once for each layer and
# point.
PATH_TOKENS = 2048
# Shares of the other model at which the loss is found.
POINTS = (0.0, 0.5, 1.0)
# Batches in which a curve between two models learns from those tokens.
CURVE_PARTS = 16
# Size of the noise on embeddings, as a share of theirs.
DISTURBANCE = 0.05
# Windows that tangent kernels are of: each answers in a few directions, and all pairs are held.
TANGENT_WINDOWS = 16
# Tokens (or pictures) that the Hessian is found on.
CURVATURE_TOKENS = 512
# Tokens of which the answers of all blocks are held, to be held against each other.
MAP_TOKENS = 2048
# Windows whose last token's probability is derived, and points on the way to each block's input.
ATTRIBUTED_WINDOWS, ATTRIBUTED_STEPS = 4, 32
# Windows of tokens that come twice, and the most tokens of each: attention is held of all pairs.
ECHO_WINDOWS, ECHO_TOKENS = 16, 64


def check_pair(source: Source, base: Source, found: Structure) -> None:
    """Refuse two models that cannot be held against each other layer by layer.

    Raises:
        UserError: A layer of the one is not in the other, or has another shape there.
    """
    for layer in found.layers.values():
        theirs, ours = base.tensors.get(layer.tensor), source.tensors[layer.tensor]
        if theirs is None:
            raise UserError(
                f"{base.label} has no {layer.tensor}, which {source.label} has.",
                "Give a model of the same architecture: the one this was made from.",
            )
        if theirs.shape != ours.shape:
            raise UserError(
                f"{layer.tensor} is {list(ours.shape)} in {source.label} and "
                f"{list(theirs.shape)} in {base.label}.",
                "Give a model of the same architecture and size.",
            )


def evidence_for(
    words: AbstractSet[str],
    prepared: Prepared,
    base: Source | None,
    shelf: Shelf,
    progress: Progress,
) -> Told:
    """What measures read that no walk through one model shows, by word and then layer or block.

    Tensors and activations are read when they are asked for, in the order of the blocks.

    Args:
        words: Of `BEFOREHAND`; those that the model as prepared does not give are left out.
        prepared: The model.
        base: The other model; None for none.
        shelf: Where activations lie between blocks.
        progress: Is told of each block.
    """
    runner, text = prepared.runner, prepared.calibration
    told: dict[str, Mapping[str, Any]] = {}
    if base is not None and "base" in words:
        told["base"] = _Weights(base, prepared.found)
    if runner is None or text is None:
        return told
    layers, few = prepared.found.layers, text.ids[:TANGENT_WINDOWS]
    alone: Mapping[str, Callable[[], Mapping[str, Any]]] = {
        "disturbed": lambda: _Stream(runner, _disturbed(runner, text.ids), "disturbed", shelf),
        "echoes": lambda: _Echoes(runner.anew(), _echoed(runner, text.ids), shelf),
        "attributions": lambda: _Attributions(runner, text.ids[:ATTRIBUTED_WINDOWS], shelf),
        "erased": lambda: _erased(runner, text.ids[:ABLATED_WINDOWS], shelf, progress),
        "later_states": lambda: _later(runner, some(text.ids, MAP_TOKENS), shelf),
        "hessian": lambda: Curvature(runner, layers, some(text.ids, CURVATURE_TOKENS)),
        "tangents": lambda: tangents(runner, layers, few, shelf),
    }
    told |= {word: gather() for word, gather in alone.items() if word in words}
    if base is not None and "base_states" in words:
        told["base_states"] = _states(prepared, base, some(text.ids, MAP_TOKENS), shelf)
    if base is not None and words & PAIRED - UNLIKE - {"base"}:
        other = Runner(base, prepared.found, device=str(runner.device), tokens=runner.tokens)
        if "base_outputs" in words:
            start = shelf.keep("base", other.starting(text.ids), len(text.ids))
            told["base_outputs"] = _Stream(other, start, "base", shelf)
        if "base_tangents" in words:
            told["base_tangents"] = tangents(other, layers, few, shelf)
        between = _Between(prepared, other, some(text.ids, PATH_TOKENS), shelf)
        if words & _PATHS:
            told |= between.evidence(words, progress)
        if words & {"bend", "curve"}:
            told |= between.bent()
    return told


def some(ids: Tensor, tokens: int) -> Tensor:
    """The first windows, as many as have so many tokens, one at least; or so many pictures."""
    of_tokens = ids.dim() == 2 and not ids.is_floating_point()
    return ids[: max(1, tokens // (ids.shape[1] if of_tokens else 1))]


@dataclass(frozen=True)
class _Weights(Mapping[str, Tensor]):
    """The weights of the other model's layers, read when they are asked for."""

    source: Source
    found: Structure

    def __getitem__(self, name: str) -> Tensor:
        layer = self.found.layers[name]
        weight = layer.matrix(self.source.read(layer.tensor)).to(torch.float32, copy=True)
        check_finite(f"{layer.tensor} of {self.source.label}", weight)
        return weight.contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self.found.layers)

    def __len__(self) -> int:
        return len(self.found.layers)


class _Stream(Mapping[str, Tensor]):
    """What blocks answer to some windows, to be asked for in their order."""

    def __init__(self, runner: Runner, start: Activations, name: str, shelf: Shelf) -> None:
        self.runner = runner
        self._name = name
        self._shelf = shelf
        self._done = -1  # number of the last block that was run
        self._after = start

    def __getitem__(self, block: str) -> Tensor:
        return self.to(block)[:].flatten(0, -2)

    def to(self, block: str, maps: AttentionMaps | None = None) -> Activations:
        """What comes out of a block, whose attention is shown to `maps`."""
        place = self.runner.blocks.index(block)
        assert place >= self._done, "blocks come in their order"
        for name in self.runner.blocks[self._done + 1 : place + 1]:
            watching = maps if name == block else None
            parts = self.runner.carry(name, self._after, {}, attention=watching)
            self._after = self._shelf.keep(self._name, parts, len(self._after), self._after)
        self._done = place
        return self._after

    def __iter__(self) -> Iterator[str]:
        return iter(self.runner.blocks)

    def __len__(self) -> int:
        return len(self.runner.blocks)


class _Echoes(Mapping[str, Tensor]):
    """What blocks attend to in some windows, to be asked for in their order."""

    def __init__(self, runner: Runner, ids: Tensor, shelf: Shelf) -> None:
        start = shelf.keep("echoes", runner.starting(ids), len(ids))
        self._stream = _Stream(runner, start, "echoes", shelf)

    def __getitem__(self, block: str) -> Tensor:
        maps = AttentionMaps(block)
        self._stream.to(block, maps)
        return maps.maps()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)

    def __len__(self) -> int:
        return len(self._stream)


def _states(prepared: Prepared, base: Source, ids: Tensor, shelf: Shelf) -> dict[str, list[Tensor]]:
    """What each block of another model answers to some windows: the same for all blocks."""
    runner = prepared.runner
    assert runner is not None
    found = structure(base)
    other = Runner(base, found, device=str(runner.device), tokens=runner.tokens)
    if other.vocabulary != runner.vocabulary:
        raise UserError(
            f"{base.label} knows {other.vocabulary} tokens and {prepared.source.label} "
            f"{runner.vocabulary}, so that they do not read the same.",
            "Compare with a model of the same tokenizer.",
        )
    seen = seen_by_blocks(other, ids, shelf)[1:]
    states = [one[:].flatten(0, -2) for one in seen]
    return dict.fromkeys(runner.blocks, states)


def _later(runner: Runner, ids: Tensor, shelf: Shelf) -> dict[str, list[Tensor]]:
    """What each block is given of some windows, and what it and all later ones answer."""
    states = [one[:].flatten(0, -2) for one in seen_by_blocks(runner, ids, shelf)]
    return {block: states[place:] for place, block in enumerate(runner.blocks)}


def _erased(runner: Runner, ids: Tensor, shelf: Shelf, progress: Progress) -> dict[str, Answers]:
    """What a model answers where one token of what a block is given is the mean of all."""

    def begun(block: str, hidden: Activations) -> dict[str, Iterator[Tensor]]:
        changed = hidden[:].clone()
        changed[:, changed.shape[1] // 2] = changed.flatten(0, -2).mean(dim=0)
        return {block: runner.carry(block, changed, {})}

    carried = Apart(runner, ids, begun, shelf, progress)
    outer = runner.outer()
    return {name: Answers(runner, carried.of(name), ids, outer) for name in carried.names}


class _Attributions(Mapping[str, Tensor]):
    """What each token that a block is given brings to the last token's probability."""

    def __init__(self, runner: Runner, ids: Tensor, shelf: Shelf) -> None:
        self.runner = runner
        self.ids = ids
        self._seen = seen_by_blocks(runner, ids, shelf)

    def __getitem__(self, block: str) -> Tensor:
        place = self.runner.blocks.index(block)
        given = self._seen[place][:].float()  # (windows, length, width)
        middle = given.mean(dim=1, keepdim=True)
        found = torch.zeros(given.shape[:2], dtype=torch.float64)
        for step in range(ATTRIBUTED_STEPS):
            here = middle.lerp(given, (step + 0.5) / ATTRIBUTED_STEPS)
            slope = self._slope(place, here)
            found += ((given - middle) * slope).sum(dim=-1, dtype=torch.float64)
        return found[:, :-1] / ATTRIBUTED_STEPS

    def _slope(self, place: int, hidden: Tensor) -> Tensor:
        """The gradient of the probability with respect to what a block is given."""
        seen = [hidden]
        for block in self.runner.blocks[place:]:
            seen.append(self.runner.forward(block, seen[-1], {}))
        gradient = self.runner.gradient(seen.pop(), self.ids, _chance)
        for block in reversed(self.runner.blocks[place:]):
            gradient = self.runner.backward(block, seen.pop(), gradient, {})
        return gradient

    def __iter__(self) -> Iterator[str]:
        return iter(self.runner.blocks)

    def __len__(self) -> int:
        return len(self.runner.blocks)


def _chance(logits: Tensor, ids: Tensor) -> Tensor:
    """The probability of each window's last token, summed."""
    told = logits[:, -2].float().softmax(dim=-1)
    return told.gather(1, ids[:, -1:].to(told.device)).sum()


def _echoed(runner: Runner, ids: Tensor) -> Tensor:
    """Windows of the text's tokens in an order drawn at random, each window twice over.

    Raises:
        UserError: The model reads no tokens, or the text has too few that are unlike.
    """
    of_tokens = ids.dim() == 2 and not ids.is_floating_point()
    known = ids.unique() if of_tokens else ids[:0].flatten()
    half = min(ECHO_TOKENS, len(known), ids.shape[-1] // 2)
    if half < 2:
        raise UserError(
            f"{runner.source.label} was shown no text of tokens that could come twice.",
            "Give a longer text, or use a measure that needs none, such as lim.",
        )
    generator = torch.Generator().manual_seed(0)
    drawn = [
        known[torch.randperm(len(known), generator=generator)[:half]] for _ in range(ECHO_WINDOWS)
    ]
    return torch.stack(drawn).repeat(1, 2)


def _disturbed(runner: Runner, ids: Tensor) -> Tensor:
    """Embeddings of some windows, moved in the direction in which the loss of each grows.

    By a share of the root mean square of all embeddings, each entry as far: one step of FGSM
    (Goodfellow et al. 2015, arXiv:1412.6572).
    """
    start = runner.start(ids)
    reach = DISTURBANCE * start.square().mean().sqrt()
    return start + reach * loss_gradient(runner, start, ids).sign()


@dataclass(frozen=True)
class _Between:
    """The loss on the way from a model to another.

    Where the models foretell no token, what both together find the likeliest is taken for the
    truth.
    """

    prepared: Prepared
    other: Runner
    ids: Tensor
    shelf: Shelf

    @property
    def runner(self) -> Runner:
        """Runs the model itself."""
        assert self.prepared.runner is not None
        return self.prepared.runner

    def evidence(self, words: AbstractSet[str], progress: Progress) -> Told:
        """The losses of both, and on the ways of each layer and block."""
        growing = {point: self.runner.start(self.ids) for point in POINTS[1:]}

        def begun(block: str, hidden: Activations) -> dict[str, Iterator[Tensor]]:
            made: dict[str, Iterator[Tensor]] = {}
            for point in POINTS[1:]:
                for one in self._inside(block) if "path" in words else ():
                    made[_named(one.name, point)] = self._moved(block, hidden, one, point)
                if "growing_path" in words:
                    made[_named(block, point)] = self._grown(block, growing, point)
            return made

        runner = self.runner
        carried = Apart(runner, self.ids, begun, self.shelf, progress)
        theirs = self._theirs()
        truth = self._truth(carried.original, theirs)
        own = _loss(runner, carried.original, self.ids, truth)
        ends = torch.tensor([own, _loss(self.other, theirs, self.ids, truth)], dtype=torch.float64)

        def paths(names: Sequence[str]) -> dict[str, Tensor]:
            made: dict[str, Tensor] = {}
            for name in names:
                points = [carried.of(_named(name, point)) for point in POINTS[1:]]
                losses = [own, *(_loss(runner, one, self.ids, truth) for one in points)]
                made[name] = torch.tensor(losses, dtype=torch.float64)
            return made

        layers, blocks = list(self.prepared.found.layers), runner.blocks
        told: dict[str, Mapping[str, Any]] = {"ends": dict.fromkeys([*layers, *blocks], ends)}
        if "path" in words:
            told["path"] = paths(layers)
        if "growing_path" in words:
            told["growing_path"] = paths(blocks)
        drawn: list[int] = torch.randperm(
            len(blocks), generator=torch.Generator().manual_seed(0)
        ).tolist()
        orders = {"deep_path": blocks[::-1], "random_path": [blocks[place] for place in drawn]}
        return told | {
            word: self._gathered(order, own, truth)
            for word, order in orders.items()
            if word in words
        }

    def _gathered(
        self, order: Sequence[str], own: float, truth: Tensor | None
    ) -> dict[str, Tensor]:
        """Losses on the ways of ever more blocks, in an order, by the block that came last."""
        runner = self.runner
        made: dict[str, Tensor] = {}
        for count, last in enumerate(order, 1):
            losses = [own]
            for point in POINTS[1:]:
                hidden: Activations = self.runner.start(self.ids)
                for block in runner.blocks:
                    names = self._tensors(f"{block}.") if block in order[:count] else ()
                    changed = {name: self._mixed(name, point) for name in names}
                    parts = runner.carry(block, hidden, changed)
                    hidden = self.shelf.keep("gathered", parts, len(self.ids), hidden)
                losses.append(_loss(runner, hidden, self.ids, truth))
            made[last] = torch.tensor(losses, dtype=torch.float64)
        return made

    def bent(self) -> Told:
        """A curve that is trained between both models, and the loss on it."""
        layers, source = self.prepared.found.layers, self.prepared.source
        names = self.runner.alone()
        if norm := next((name for name in names if name.endswith("running_var")), ""):
            raise UserError(
                f"{source.label} has batch norms ({norm}), whose statistics are not known on a "
                "curve between two models.",
                "Measure the straight way, of one layer at a time (barrier).",
            )
        if left := next((one.name for one in layers.values() if one.tensor not in names), ""):
            raise UserError(
                f"{left} is one of several tensors that the model joins, which no curve is made "
                "of.",
                "Measure the straight way, of one layer at a time (barrier).",
            )
        ends = [
            {name: one.read(name).float() for name in names} for one in (source, self.other.source)
        ]
        answer, count = self.runner.block_answer("", {}), len(self.ids)
        truth: Tensor | None = None

        def loss(network: Mapping[str, Tensor], part: Tensor) -> Tensor:
            shown = self.ids[part]
            logits = answer(shown, network).float()
            if truth is not None:
                return functional.cross_entropy(logits.flatten(0, -2), truth[part].flatten())
            scored, chosen = answered(self.runner, logits, shown)
            return functional.cross_entropy(scored, chosen)

        with torch.no_grad():
            if not foretells(self.runner, answer(self.ids[:1], ends[0]), self.ids[:1]):
                both = [answer(self.ids, end).float().log_softmax(dim=-1) for end in ends]
                truth = (both[0] + both[1]).argmax(dim=-1)
        batch = max(1, count // CURVE_PARTS)
        middle = bent(loss, ends[0], ends[1], count, batch=batch)
        losses = along(loss, (ends[0], middle, ends[1]), count, batch=batch)
        found = torch.tensor(losses, dtype=torch.float64)
        return {
            "bend": {
                name: one.matrix(middle[one.tensor]).contiguous() for name, one in layers.items()
            },
            "curve": dict.fromkeys(layers, found),
        }

    def _theirs(self) -> Activations:
        """The windows after the other model's last block."""
        count = len(self.ids)
        carried = self.shelf.keep("other", self.other.starting(self.ids), count)
        for block in self.other.blocks:
            parts = self.other.carry(block, carried, {})
            carried = self.shelf.keep("other", parts, count, carried)
        return carried

    def _inside(self, block: str) -> list[Layer]:
        layers = self.prepared.found.layers.values()
        return [one for one in layers if self.runner.whole or one.block == block]

    def _moved(
        self, block: str, hidden: Activations, layer: Layer, point: float
    ) -> Iterator[Tensor]:
        """Windows through a block with one of its layers part of the way to the other's."""
        yield from self.runner.carry(block, hidden, self._mixed_layer(layer, point))

    def _grown(self, block: str, growing: dict[float, Tensor], point: float) -> Iterator[Tensor]:
        """The same with the whole block, on what the blocks before it make, as they went as far."""
        names = self._tensors(f"{block}.")
        changed = {name: self._mixed(name, point) for name in names}
        growing[point] = torch.cat(list(self.runner.carry(block, growing[point], changed)))
        yield growing[point]

    def _mixed_layer(self, layer: Layer, point: float) -> dict[str, Tensor]:
        """A layer's weight and what stands beside it in its module."""
        name = layer.tensor
        if layer.expert is not None:
            whole = self.prepared.source.read(name).float().clone()
            whole[layer.expert] = self._mixed(name, point)[layer.expert]
            return {name: whole}
        names = {name, *self._tensors(f"{layer.name}.")}
        return {name: self._mixed(name, point) for name in sorted(names)}

    def _tensors(self, prefix: str) -> list[str]:
        """What both models have below a module; counters are not moved."""
        theirs = self.other.source.tensors
        return [
            name
            for name, info in self.prepared.source.tensors.items()
            if name.startswith(prefix) and info.dtype.is_floating_point and name in theirs
        ]

    def _mixed(self, name: str, point: float) -> Tensor:
        ours, theirs = (one.read(name).float() for one in (self.prepared.source, self.other.source))
        return ours.lerp(theirs, point)

    def _truth(self, ours: Activations, theirs: Activations) -> Tensor | None:
        """What is taken for the truth where it is not the next token."""
        first = next(self.runner.logits(ours[:1], self.ids[:1], {}))
        if foretells(self.runner, first, self.ids[:1]):
            return None
        both = [
            torch.cat(list(runner.logits(after, self.ids, {}))).float().log_softmax(dim=-1)
            for runner, after in ((self.runner, ours), (self.other, theirs))
        ]
        return (both[0] + both[1]).flatten(0, -2).argmax(dim=-1)


def _named(name: str, point: float) -> str:
    return f"{name} at {point}"


def _loss(runner: Runner, after: Activations, ids: Tensor, truth: Tensor | None) -> float:
    """Mean cross-entropy, in nats per prediction."""
    if truth is not None:
        logits = torch.cat(list(runner.logits(after, ids, {}))).float()
        return float(functional.cross_entropy(logits.flatten(0, -2), truth))
    total, predicted = 0.0, 0
    batches = ids.split(runner.answering(ids))
    for logits, tokens in zip(runner.logits(after, ids, {}), batches, strict=True):
        scored, chosen = answered(runner, logits.float(), tokens)
        total += float(functional.cross_entropy(scored, chosen, reduction="sum"))
        predicted += len(chosen)
    return total / predicted
