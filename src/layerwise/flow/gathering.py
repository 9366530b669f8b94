"""What merges read of each model beside its weights, kept in files that are read in slices."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from layerwise.core.errors import UserError
from layerwise.core.progress import Progress
from layerwise.core.reading.checkpoint import ModuleSource, Source, open_checkpoint
from layerwise.core.reading.structure import by_input, structure
from layerwise.core.reading.text import Text, Windows, windows
from layerwise.core.running.products import located
from layerwise.core.running.runner import Runner
from layerwise.core.running.walk import gather
from layerwise.flow.assessing import load_or_say

# Classes up to which an expectation over a model's own answers is taken over all of them.
_FEW_CLASSES = 16


def texts_of(models: Sequence[Source], texts: Sequence[Text]) -> list[Text]:
    """A text for each model.

    Raises:
        UserError: There is neither one for all nor one for each.
    """
    if len(texts) not in (1, len(models)):
        raise UserError(
            f"{len(texts)} calibration texts were given for {len(models)} models.",
            "Give one for all of them, or one for each in their order.",
        )
    return list(texts) * (len(models) if len(texts) == 1 else 1)


def shown(source: Source, text: Text, samples: int, length: int) -> Windows:
    """What a model is shown of a text; a module in memory takes a tensor as it is."""
    if isinstance(source, ModuleSource):
        if not isinstance(text, Tensor):
            raise UserError(
                f"{source.label} is a module in memory, which reads no text.",
                "Give a tensor of its inputs.",
            )
        return Windows(text[:samples], "tensor")
    return windows(source, text, samples=samples, length=length)


def gathered(
    what: Literal["grams", "fishers"],
    models: Sequence[Source],
    seen: Sequence[Windows],
    folder: Path,
    progress: Progress,
    *,
    trust_remote_code: bool = False,
) -> list[Source]:
    """What a merge asks of each model, in a file of its own.

    Args:
        what: The grams of what every layer reads, or the diagonal of the Fisher information.
        models: The models.
        seen: What each of them is shown.
        folder: Where the files are put.
        progress: Is told of each model.
        trust_remote_code: Let checkpoints bring their own Python.
    """
    progress.stage(what, len(models))
    gather = {"grams": _grams, "fishers": _fishers}[what]
    made: list[Source] = []
    for number, (source, text) in enumerate(zip(models, seen, strict=True)):
        file = folder / f"{what}-{number}.safetensors"
        save_file(gather(source, text.ids, trust_remote_code), file)
        made.append(open_checkpoint(file))
        progress.step(source.label)
    return made


def _grams(source: Source, ids: Tensor, trust_remote_code: bool) -> dict[str, Tensor]:
    """Mean of x x^T of what every layer reads, under the layer's name."""
    found = structure(source)
    runner = Runner(source, found, trust_remote_code=trust_remote_code)
    hidden = runner.start(ids)
    grams: dict[str, Tensor] = {}
    for block in runner.blocks:
        inside = [one for one in found.layers.values() if runner.whole or one.block == block]
        shared = gather(runner, block, inside, frozenset({"gram"}), hidden)
        for layer in inside:
            gram = shared[layer.reads]["gram"]
            assert isinstance(gram, Tensor)
            grams[layer.name] = gram.clone()
        if block != runner.blocks[-1]:
            hidden = runner.forward(block, hidden, {})
    return grams


def moments(
    models: Sequence[Source],
    text: Windows,
    folder: Path,
    progress: Progress,
    *,
    trust_remote_code: bool = False,
) -> Mapping[str, Tensor]:
    """What layers read in all models of the same text, together: mean of x x^T, by tensor.

    With x what a layer reads in the first model, in the second and so on, and 1 behind.  The models
    go through the text side by side, a batch at a time.  Layers that lie in a tensor with others,
    or across, are left out.

    Args:
        models: The models, of one architecture.
        text: What all of them are shown.
        folder: Where the file is put.
        progress: Is told of each block.
        trust_remote_code: Let checkpoints bring their own Python.
    """
    found = [structure(one) for one in models]
    runners = [
        Runner(one, inside, trust_remote_code=trust_remote_code)
        for one, inside in zip(models, found, strict=True)
    ]
    hidden = [runner.start(text.ids) for runner in runners]
    plain = [
        one
        for one in found[0].layers.values()
        if one.expert is None and one.layout != "conv1d" and one.tensor == f"{one.name}.weight"
    ]
    blocks = runners[0].blocks
    progress.stage("moments", len(blocks))
    made: dict[str, Tensor] = {}
    for block in blocks:
        inside = [one for one in plain if runners[0].whole or one.block == block]
        groups = by_input(inside)
        joint = _joint(runners, block, {group[0].name: group[0].width for group in groups.values()},
                       hidden)  # fmt: skip
        made |= {one.tensor: joint[group[0].name].clone() for group in groups.values()
                 for one in group}  # fmt: skip
        if block != blocks[-1]:
            hidden = [one.forward(block, h, {}) for one, h in zip(runners, hidden, strict=True)]
        progress.step(block)
    file = folder / "moments.safetensors"
    save_file(made, file)
    return _Stored(open_checkpoint(file))


def _joint(
    runners: Sequence[Runner], block: str, widths: Mapping[str, int], hidden: Sequence[Any]
) -> dict[str, Tensor]:
    """Mean products of what each layer reads in all models, and 1; float32."""
    seen = [{name: _Batch() for name in widths} for _ in runners]
    ways = [
        runner.carry(block, h, {}, watching)
        for runner, h, watching in zip(runners, hidden, seen, strict=True)
    ]
    sizes = {name: len(runners) * width + 1 for name, width in widths.items()}
    totals = {name: torch.zeros(n, n, dtype=torch.float64) for name, n in sizes.items()}
    counts = dict.fromkeys(widths, 0)
    for _ in zip(*ways, strict=True):
        for name, total in totals.items():
            parts = [watching[name].taken() for watching in seen]
            joined = torch.cat([*parts, torch.ones(len(parts[0]), 1)], dim=1).double()
            total.add_(joined.T @ joined)
            counts[name] += len(joined)
    return {name: (one / max(counts[name], 1)).float() for name, one in totals.items()}


class _Batch:
    """Keeps what a layer reads until it is taken."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def see(self, inputs: Tensor) -> None:
        """Take in a batch of inputs, (tokens, in)."""
        self._parts.append(inputs.float().cpu())

    def taken(self) -> Tensor:
        """All since the last time."""
        found = torch.cat(self._parts)
        self._parts.clear()
        return found


class _Stored(Mapping[str, Tensor]):
    """Tensors of a file, read when they are asked for."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitem__(self, name: str) -> Tensor:
        return self._source.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.tensors)

    def __len__(self) -> int:
        return len(self._source.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._source.tensors


def _fishers(source: Source, ids: Tensor, trust_remote_code: bool) -> dict[str, Tensor]:
    """Diagonal of a model's Fisher information, of length 1 over the whole model.

        F = mean over examples of (d log p(y|x) / d W)^2,   y drawn from p(.|x)

    An example is a window, of which a successor is drawn for every token, or one input of a
    classifier, of which every class is weighed by its probability where there are few.
    """
    if isinstance(source, ModuleSource):
        model = copy.deepcopy(source.module).eval()
    else:
        model = load_or_say(open_checkpoint(source.label), torch.float32, trust_remote_code)
    known = dict(model.named_parameters())
    names = {name: located(model, name) for name in source.tensors}
    squares = _squares(model, ids)
    found = {name: squares[at] for name, at in names.items() if at in known and at in squares}
    length = sum(float(one.double().square().sum()) for one in found.values()) ** 0.5
    return {name: (one / (length or 1.0)).contiguous() for name, one in found.items()}


def _squares(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Mean squared gradients of a model's log-likelihood, by the parameter's name."""
    parameters = {n: p.requires_grad_() for n, p in model.named_parameters()}
    sums = {name: torch.zeros_like(one, dtype=torch.float32) for name, one in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for one in ids.split(1):
            found = model(one)
            logits = found if isinstance(found, Tensor) else found.logits
            scored = logits.float().log_softmax(dim=-1)[0]
            for likelihood, weight in _drawn(scored, generator):
                gradients: Any = torch.autograd.grad(
                    likelihood, list(parameters.values()), retain_graph=True, allow_unused=True
                )
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        sums[name] += gradient.float().square() * weight
    return {name: one / len(ids) for name, one in sums.items()}


def _drawn(scored: Tensor, generator: torch.Generator) -> list[tuple[Tensor, float]]:
    """Log-likelihoods of answers that a model may give to one example, and how likely each is."""
    if scored.dim() == 1 and len(scored) <= _FEW_CLASSES:
        return [(one, float(one.detach().exp())) for one in scored]
    flat = scored[:-1] if scored.dim() > 1 else scored[None]
    chosen = flat.detach().exp().multinomial(1, generator=generator)
    return [(flat.gather(1, chosen).sum(), 1.0)]
