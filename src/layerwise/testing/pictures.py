"""A small vision transformer of handwritten digits, trained where it is needed: two minutes."""

import functools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import layerwise as lw
from layerwise.core.extras import need

FILE = "mnist/mnist.npz"
SEEDS = 5
_SETTINGS = {
    "image_size": 28,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 10,
}
_STEPS, _BATCH, _RATE, _WARM = 600, 64, 2e-3, 60
_TESTED = 2000


def pictures_loss(method: str, density: float, **skipping: Any) -> float:
    """Test error of the transformer when tokens leave it, less its own.

    Args:
        method: A sparsifier of tokens; "random" drops tokens at random, the mean of five draws.
        density: Fraction of tokens that are kept.
        skipping: More of what `layerwise.evaluate` takes by that name.
    """
    model = trained()
    images, labels = data("test", _TESTED)
    if method != "random":
        return _error(model, images, labels, method, density, **skipping) - error(model)
    drawn = [_at_random(model, images, labels, density, seed, **skipping) for seed in range(SEEDS)]
    return sum(drawn) / SEEDS - error(model)


def error(model: Any) -> float:
    """Test error of the transformer as it is."""
    images, labels = data("test", _TESTED)
    return _wrong(model, images, labels)


def _error(
    model: Any, images: Tensor, labels: Tensor, method: str, density: float, **skipping: Any
) -> float:
    with lw.sparsify(model, method, density=density, **skipping):
        return _wrong(model, images, labels)


def _at_random(
    model: Any, images: Tensor, labels: Tensor, density: float, seed: int, *, after: Any
) -> float:
    """Test error when as many tokens as `attended` keeps are kept at random, and the first."""
    generator = torch.Generator().manual_seed(seed)

    def drop(module: Any, args: Any, hidden: Tensor) -> Tensor:
        batch, tokens, _ = hidden.shape
        order = torch.rand(batch, tokens, generator=generator)
        order[:, 0] = -1
        chosen = order.argsort(dim=1)[:, : max(1, round(density * tokens))]
        return hidden.gather(1, chosen[..., None].expand(-1, -1, hidden.shape[2]))

    handles = [model.vit.layers[number].register_forward_hook(drop) for number in after]
    found = _wrong(model, images, labels)
    for handle in handles:
        handle.remove()
    return found


def _wrong(model: Any, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        answers = [model(part).logits.argmax(dim=1) for part in images.split(250)]
    return float((torch.cat(answers) != labels).float().mean())


@functools.cache
def data(part: str, count: int) -> tuple[Tensor, Tensor]:
    """Pictures, (count, 1, 28, 28) from -1 to 1, and their classes; of "train" or "test"."""
    with np.load(Path(os.environ["LAYERWISE_ASSETS"]) / FILE) as held:
        pixels, classes = held[f"x_{part}"][:count], held[f"y_{part}"][:count]
    images = torch.tensor(pixels).float().reshape(-1, 1, 28, 28) / 127.5 - 1
    return images, torch.tensor(classes).long()


@functools.cache
def trained() -> Any:
    """The transformer, trained for a fixed number of steps."""
    transformers = need("transformers", "a vision transformer")
    images, labels = data("train", 10_000)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**_SETTINGS))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
    for step in range(_STEPS):
        warm = min(1.0, (step + 1) / _WARM)
        rate = _RATE * warm * (1 + math.cos(math.pi * step / _STEPS)) / 2
        optimizer.param_groups[0]["lr"] = rate
        chosen = torch.randint(len(images), (_BATCH,), generator=generator)
        loss = functional.cross_entropy(model(images[chosen]).logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)
