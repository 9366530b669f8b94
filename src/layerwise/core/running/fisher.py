"""How much the model's answer cares about each output of each layer, and about each weight.

Gradients go back through one block at a time, with what each block saw kept until they come.
"""

import shutil
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.progress import Progress
from layerwise.core.reading.families import CAUSAL_MODELS
from layerwise.core.reading.structure import Layer
from layerwise.core.running.carried import Activations, Shelf
from layerwise.core.running.evidence import GradientCollector, WeightGradientCollector
from layerwise.core.running.runner import Runner

# Windows of the calibration text that gradients of weights are gathered on: those of one window
# vary, those of many tokens are near their mean.
GRADIENT_WINDOWS = 16


def output_fisher(
    runner: Runner,
    layers: Sequence[Layer],
    ids: Tensor,
    progress: Progress,
    shelf: Shelf = Shelf(),  # noqa: B008
) -> dict[str, Float[Tensor, " out"]]:
    """Diagonal of the Fisher information of each layer's outputs, in nats per predicted token.

    With tokens sampled from the model's own distribution p, and y the outputs of a layer,

        f_o = sum over positions of (d log p(sampled) / d y_o)^2 / predicted tokens

    so that a change of y whose mean square over positions is e_o moves the model by

        KL(before, after) ~ 1/2 sum_o f_o e_o        nats per token

    to second order, taking outputs and positions for uncorrelated: the diagonal of the expansion
    in Martens, "New Insights and Perspectives on the Natural Gradient Method", 2014
    (arXiv:1412.1193).  The gradient goes back through one block at a time.

    Args:
        runner: Runs the model.
        layers: Layers to look at.
        ids: Token ids, (windows, length), or whatever the model takes a batch of.
        progress: Is told of each block.
        shelf: Where what each block sees is kept until the gradient comes back to it.
    """
    progress.stage("gradients", len(runner.blocks))
    seen = seen_by_blocks(runner, ids, shelf)
    generator = torch.Generator().manual_seed(0)
    predicted = 0

    def log_likelihood(logits: Tensor, _: Tensor) -> Tensor:
        nonlocal predicted
        chosen = drawn(logits, generator)
        predicted += len(chosen)
        return chosen.sum()

    gradient = runner.gradient(seen.pop(), ids, log_likelihood)
    found: dict[str, Tensor] = {}
    for block in reversed(runner.blocks):
        inside = [layer for layer in layers if runner.whole or layer.block == block]
        collectors = {layer.name: GradientCollector(layer) for layer in inside}
        gradient = runner.backward(block, seen.pop(), gradient, collectors)
        found |= {name: (one.squares / predicted).float() for name, one in collectors.items()}
        progress.step(block)
    return found


class WeightGradients:
    """The mean gradient of the loss of a model as it is, with respect to its layers' weights.

    The loss is the cross-entropy of each window's next tokens; for models that foretell none, that
    of the answers which the model itself finds the most likely.  Gradients of weights are made
    when their block's turn comes, from what the block sees and the gradient of what it answers:
    these are all that is kept of a pass through the model and back, which is made when the first
    are asked for.

    Args:
        runner: Runs the model.
        ids: Token ids, (windows, length), or whatever the model takes a batch of; the first few
            are used.
        shelf: Where what is kept lies.
    """

    def __init__(self, runner: Runner, ids: Tensor, shelf: Shelf = Shelf()) -> None:  # noqa: B008
        self.runner = runner
        self.ids = ids[:GRADIENT_WINDOWS]
        self.shelf = shelf
        self.predicted = 0
        self._kept: dict[str, tuple[Activations, Activations]] = {}

    def of(self, block: str, layers: Sequence[Layer]) -> dict[str, Float[Tensor, "_ _"]]:
        """Gradients for some layers of a block, by name, (out, in).

        Raises:
            UserError: A layer is not one that gradients are seen of.
        """
        if not self._kept:
            if self.shelf.folder is not None:
                self.shelf.folder.mkdir(exist_ok=True)
            self._go_back()
        seen, gradient = self._kept[block]
        collectors = {layer.name: WeightGradientCollector(layer) for layer in layers}
        self.runner.backward(block, seen, gradient[:], collectors)
        return {name: one.mean(self.predicted) for name, one in collectors.items()}

    def drop(self) -> None:
        """Let go of all that is kept; of a shelf on disk, with its folder."""
        self._kept.clear()
        if self.shelf.folder is not None:
            shutil.rmtree(self.shelf.folder, ignore_errors=True)

    def _go_back(self) -> None:
        runner, count = self.runner, len(self.ids)
        seen = seen_by_blocks(runner, self.ids, self.shelf)
        gradient = runner.gradient(seen.pop(), self.ids, self._loss)
        for block in reversed(runner.blocks):
            before = seen.pop()
            kept = self.shelf.keep(f"gradient-{len(seen)}", [gradient], count)
            self._kept[block] = before, kept
            if seen:
                gradient = runner.backward(block, before, gradient, {})

    def _loss(self, logits: Tensor, ids: Tensor) -> Tensor:
        scored, chosen = answered(self.runner, logits, ids)
        self.predicted += len(chosen)
        return torch.nn.functional.cross_entropy(scored, chosen, reduction="sum")


def answered(
    runner: Runner, logits: Tensor, ids: Tensor
) -> tuple[Float[Tensor, "predicted classes"], Int64[Tensor, " predicted"]]:
    """What a model answers to some windows, and what is taken for the truth.

    Raises:
        UserError: It answers with no numbers for classes.
    """
    if logits.dim() < 2 or not logits.is_floating_point():
        raise UserError(
            f"{runner.source.label} answers with a tensor of shape {tuple(logits.shape)}, which is "
            "not a distribution: there is no loss to take gradients of.",
            "Use methods that need no gradients (`layerwise methods --needs calibration`).",
        )
    if foretells(runner, logits, ids):
        return logits[:, :-1].flatten(0, -2), ids[:, 1:].flatten().to(logits.device)
    scored = logits.flatten(0, -2)
    return scored, scored.detach().argmax(dim=-1)


def foretells(runner: Runner, logits: Tensor, ids: Tensor) -> bool:
    """Whether a model answers every token with a distribution of the next."""
    architecture = (runner.source.config.get("architectures") or [CAUSAL_MODELS[0]])[0]
    tokens = not ids.is_floating_point() and ids.dim() == 2 and ids.shape[1] > 1
    of_tokens = tokens and logits.dim() == 3 and logits.shape[:2] == ids.shape
    return architecture.endswith(CAUSAL_MODELS) and of_tokens and int(ids.max()) < logits.shape[-1]


def loss_gradient(runner: Runner, start: Tensor, ids: Tensor) -> Tensor:
    """Gradient of the loss of `WeightGradients` with respect to what the first block sees.

    Args:
        runner: Runs the model.
        start: What its first block sees.
        ids: The windows.
    """

    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        scored, chosen = answered(runner, logits, tokens)
        return torch.nn.functional.cross_entropy(scored, chosen, reduction="sum")

    seen = [start]
    for block in runner.blocks:
        seen.append(runner.forward(block, seen[-1], {}))
    gradient = runner.gradient(seen.pop(), ids, loss)
    for block in reversed(runner.blocks):
        gradient = runner.backward(block, seen.pop(), gradient, {})
    return gradient


def seen_by_blocks(runner: Runner, ids: Tensor, shelf: Shelf) -> list[Activations]:
    """What each block sees, and what the last one answers."""
    seen = [shelf.keep("seen-0", runner.starting(ids), len(ids))]
    for number, block in enumerate(runner.blocks, 1):
        parts = runner.carry(block, seen[-1], {})
        seen.append(shelf.keep(f"seen-{number}", parts, len(ids)))
    return seen


def drawn(logits: Tensor, generator: torch.Generator) -> Float[Tensor, "predicted 1"]:
    """Log-probabilities of tokens that are drawn from a model's own answer."""
    # The last position of a window predicts a token outside of it.
    scored = (logits[:, :-1] if logits.dim() > 2 else logits).log_softmax(dim=-1)
    flat = scored.flatten(0, -2)
    tokens = flat.detach().exp().cpu().multinomial(1, generator=generator).to(flat.device)
    return flat.gather(1, tokens)
