"""A small classifier of handwritten digits, trained where it is needed: seconds, any machine."""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwise.core import catalogue

SEEDS = 5


def digits_loss(allocate: str, density: float) -> float:
    """Error rate after magnitude pruning to the densities an allocator gives, over five seeds.

    Args:
        allocate: Allocator that reads weights, shapes or costs; it has a level per thousandth of a
            layer.
        density: Fraction of all weights to keep.
    """
    return sum(_loss(seed, allocate, density) for seed in range(SEEDS)) / SEEDS


def _loss(seed: int, allocate: str, density: float) -> float:
    model, images, labels = _trained(seed)
    layers = [part for part in model if isinstance(part, nn.Linear)]
    weights = [layer.weight.detach() for layer in layers]
    allocator = catalogue.get(f"allocate/{allocate}")
    shapes = [tuple(weight.shape) for weight in weights]
    given = {"weights": weights, "shapes": shapes, "costs": _costs(weights)}
    budget = int(density * sum(weight.numel() for weight in weights))
    chosen = allocator.run(**{word: given[word] for word in allocator.evidence}, budget=budget)
    prune = catalogue.get("prune/magnitude")
    hidden = images
    for depth, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
        kept = float(given["costs"][depth][chosen[depth]]) / weight.numel()
        pruned = prune.run(weight, density=kept).weight
        hidden = functional.linear(hidden if depth == 0 else hidden.relu(), pruned, layer.bias)
    return float((hidden.argmax(dim=1) != labels).float().mean())


def _costs(weights: list[Tensor]) -> list[Tensor]:
    """A level per thousandth of a layer, which is what a uniform density can then express."""
    return [(torch.arange(1, 1001) * weight.numel()) // 1000 for weight in weights]


@functools.cache
def _trained(seed: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    pixels, classes = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16).float(), torch.tensor(classes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(150):
            loss = functional.cross_entropy(model(images[:1200]), labels[:1200])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.requires_grad_(False), images[1200:], labels[1200:]
