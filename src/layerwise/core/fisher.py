"""How much the model's answer cares about each output of each layer."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.carried import Shelf
from layerwise.core.evidence import GradientCollector
from layerwise.core.progress import Progress
from layerwise.core.runner import Runner
from layerwise.core.structure import Layer


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
    seen = [shelf.keep("seen-0", runner.starting(ids), len(ids))]
    for number, block in enumerate(runner.blocks, 1):
        parts = runner.carry(block, seen[-1], {})
        seen.append(shelf.keep(f"seen-{number}", parts, len(ids)))
    generator = torch.Generator().manual_seed(0)
    predicted = 0

    def log_likelihood(logits: Tensor) -> Tensor:
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


def drawn(logits: Tensor, generator: torch.Generator) -> Float[Tensor, "predicted 1"]:
    """Log-probabilities of tokens that are drawn from a model's own answer."""
    # The last position of a window predicts a token outside of it.
    scored = (logits[:, :-1] if logits.dim() > 2 else logits).log_softmax(dim=-1)
    flat = scored.flatten(0, -2)
    tokens = flat.detach().exp().cpu().multinomial(1, generator=generator).to(flat.device)
    return flat.gather(1, tokens)
