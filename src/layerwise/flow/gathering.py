"""What merges read of each model beside its weights, kept in files that are read in slices."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from layerwise.core.errors import UserError
from layerwise.core.progress import Progress
from layerwise.core.reading.checkpoint import ModuleSource, Source, open_checkpoint
from layerwise.core.reading.structure import structure
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
