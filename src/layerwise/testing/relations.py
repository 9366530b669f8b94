"""Small classifiers of digits in the relations that merges are about: minutes, any machine.

Tuned from one network to other pictures, trained twice from nothing, and tuned away from pictures
of many kinds.
"""

import copy
import functools
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional

from layerwise import api
from layerwise.core import catalogue

SEEDS = 3
_TRAIN = 1200
_MOMENTUM = 0.9


def network(*sides: int) -> nn.Sequential:
    """Linear layers with rectifiers between them."""
    parts: list[nn.Module] = []
    for width, rows in itertools.pairwise(sides):
        parts += [nn.Linear(width, rows), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    rate: float,
    decay: float = 0.0,
    smoothing: float = 0.0,
    batch: int = 64,
) -> None:
    """Stochastic gradient descent with momentum on cross-entropy.

    Args:
        model: Is changed.
        images: What it reads.
        labels: The classes.
        epochs: How often all is shown.
        rate: Of learning.
        decay: Of weights.
        smoothing: Share of a label that is spread over all classes; 0.1 is BANG's.
        batch: Pictures of a step.
    """
    model.requires_grad_(True).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=_MOMENTUM, weight_decay=decay)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(batch):
            loss = functional.cross_entropy(
                model(images[chosen]), labels[chosen], label_smoothing=smoothing
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.requires_grad_(False).eval()


def seeded(seed: int) -> Any:
    """A block in which numbers are drawn from a seed, and after which all is as before."""
    return _Seeded(seed)


class _Seeded:
    def __init__(self, seed: int) -> None:
        self._fork = torch.random.fork_rng()
        self._seed = seed

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *told: Any) -> None:
        self._fork.__exit__(*told)


@functools.cache
def digits(*, train: bool) -> tuple[Tensor, Tensor]:
    """Pictures of 8 x 8 from 0 to 1, (pictures, 64), and their classes.

    They are drawn at random for the two parts: in the order of the file the last ones are of other
    writers, and harder.
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    pixels, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pixels))
    part = order[:_TRAIN] if train else order[_TRAIN:]
    images = torch.from_numpy(np.asarray(pixels[part], dtype=np.float32) / 16)
    return images, torch.from_numpy(np.asarray(classes[part], dtype=np.int64))


def spoiled(images: Tensor, kind: str, amount: float = 0.0) -> Tensor:
    """Pictures with a corruption: contrast, blur, noise, or turned or shifted by an amount."""
    if kind == "contrast":
        return 0.25 * images + 0.375
    if kind == "noise":
        drawn = np.random.default_rng(len(images)).normal(0, amount or 0.5, images.shape)
        return images + torch.from_numpy(drawn.astype(np.float32))
    square = images.numpy().reshape(-1, 8, 8)
    if kind == "blur":
        made: Any = ndimage.gaussian_filter(square, sigma=(0, 1, 1))
    elif kind == "turn":
        made = ndimage.rotate(square, amount, axes=(1, 2), reshape=False, order=1)
    else:
        made = np.roll(square, int(amount), axis=2)
    return torch.from_numpy(np.ascontiguousarray(made, dtype=np.float32)).reshape(-1, 64)


def error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of pictures that are misclassified."""
    with torch.no_grad():
        return float((model(images).argmax(dim=1) != labels).float().mean())


def merged(
    method: str,
    models: Sequence[nn.Module],
    options: Mapping[str, Any],
    *,
    base: nn.Module | None = None,
    inputs: Tensor | None = None,
) -> nn.Module:
    """What a merge makes of networks in memory."""
    chosen = catalogue.get(f"merge/{method}")
    reads = {"grams", "fishers", "moments"} & set(chosen.evidence)
    with tempfile.TemporaryDirectory() as folder:
        api.merge(
            models,
            Path(folder) / "out",
            base=base if {"base", "origin"} & set(chosen.evidence) else None,
            method=method,
            options=chosen.accepts(options),
            calibration=inputs if reads else None,
            samples=0 if inputs is None else len(inputs),
        )
        return api.load(Path(folder) / "out", into=models[0]).eval()


@functools.cache
def corrupted(seed: int, kind: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A network that saw a little, and what clean and corrupted pictures make of it."""
    images, labels = digits(train=True)
    with seeded(seed):
        start = network(64, 128, 128, 128, 10)
        train(start, images[:200], labels[:200], epochs=10, rate=0.02)
        tuned: list[nn.Module] = []
        for shown in (images, spoiled(images, kind)):
            model = copy.deepcopy(start)
            train(model, shown, labels, epochs=30, rate=0.02)
            tuned.append(model)
    return start, tuned[0], tuned[1]


def corrupted_loss(method: str, options: Mapping[str, Any]) -> float:
    """Error rate on corrupted pictures after a merge with a network that was tuned to them.

    Args:
        method: The merge, or `clean` for the network tuned to clean pictures alone.
        options: `kind` of the corruption; the others are the merge's.
    """
    kind = options["kind"]
    images, labels = digits(train=False)
    total = 0.0
    for seed in range(SEEDS):
        start, clean, other = corrupted(seed, kind)
        model = clean if method == "clean" else merged(method, [clean, other], options, base=start)
        total += error(model, spoiled(images, kind), labels)
    return total / SEEDS


@functools.cache
def twins(seed: int, width: int, count: int = 2) -> tuple[nn.Module, ...]:
    """Networks with two hidden layers of a width, each trained from another seed."""
    images, labels = digits(train=True)
    found: list[nn.Module] = []
    for place in range(count):
        with seeded(100 * seed + place):
            model = network(64, width, width, 10)
            train(model, images, labels, epochs=40, rate=0.02, decay=1e-4)
        found.append(model)
    return tuple(found)


def barrier_loss(method: str, options: Mapping[str, Any]) -> float:
    """What the middle of two networks loses beyond their mean, in nats per test picture.

    Args:
        method: `linear`, or `weight_matching` for the middle after one was permuted.
        options: `width` of the hidden layers; the others are the merge's.
    """
    images, labels = digits(train=False)
    total = 0.0
    for seed in range(SEEDS):
        pair = twins(seed, options["width"])
        losses = [
            cross_entropy(one, images, labels) for one in (merged(method, pair, options), *pair)
        ]
        total += losses[0] - (losses[1] + losses[2]) / 2
    return total / SEEDS


def twins_loss(method: str, options: Mapping[str, Any]) -> float:
    """Error rate of what two networks of other seeds become.

    Args:
        method: The merge; what it reads of inputs is the training pictures.
        options: `width` of the hidden layers; the others are the merge's.
    """
    images, labels = digits(train=False)
    shown, _ = digits(train=True)
    return (
        sum(
            error(merged(method, twins(seed, options["width"]), options, inputs=shown),
                  images, labels)
            for seed in range(SEEDS)
        )
        / SEEDS
    )  # fmt: skip


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Mean loss of a classifier, in nats."""
    with torch.no_grad():
        return float(functional.cross_entropy(model(images), labels))


_WISE_SEEDS = 4
# What the start saw of its half of the pictures, and what the tuned network never sees.
_WIDE = (("turn", -30.0), ("turn", -15.0), ("turn", 0.0), ("turn", 15.0), ("turn", 30.0))
_SHIFTED = (("turn", 30.0), ("turn", -30.0), ("noise", 0.35), ("shift", 1.0))


@functools.cache
def narrowed(seed: int, smoothing: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """A network that saw pictures of many kinds, and what clean ones make of it.

    Args:
        seed: Draws the weights, the order and the noise.
        smoothing: Of the labels as it is tuned: BANG's fine-tuning, which leaves the tuned network
            less sure of itself, so that it does not outvote the other when both are averaged.
    """
    images, labels = digits(train=True)
    half = len(images) // 2
    with seeded(seed):
        start = network(64, 128, 128, 10)
        seen = [spoiled(images[:half], *kind) for kind in _WIDE]
        seen += [spoiled(images[:half], "noise", 0.2)]
        shown = torch.cat(seen)
        train(start, shown, labels[:half].repeat(len(seen)), epochs=15, rate=0.02)
        tuned = copy.deepcopy(start)
        train(tuned, images[half:], labels[half:], epochs=60, rate=0.05, smoothing=smoothing)
    return start, tuned


def shifted_error(model: nn.Module) -> float:
    """Share of pictures that are misclassified, over four kinds that no tuning showed."""
    images, labels = digits(train=False)
    return sum(error(model, spoiled(images, *kind), labels) for kind in _SHIFTED) / len(_SHIFTED)


def shifted_loss(method: str, options: Mapping[str, Any]) -> float:
    """Error rate on pictures unlike those that a network was tuned to.

    Args:
        method: `tuned` for that network alone; `unsmoothed` for its WiSE-FT after plain labels; or
            a merge of it with what it was tuned from.
        options: `smoothing` of the labels as it is tuned; the others are the merge's.
    """
    total = 0.0
    smoothing = 0.0 if method == "unsmoothed" else options.get("smoothing", 0.0)
    name = "wise_ft" if method == "unsmoothed" else method
    for seed in range(_WISE_SEEDS):
        start, tuned = narrowed(seed, smoothing)
        model = tuned if method == "tuned" else merged(name, [tuned], options, base=start)
        total += shifted_error(model)
    return total / _WISE_SEEDS


_TURNS = (20.0, -20.0)


@functools.cache
def cooks(seed: int, what: str) -> tuple[nn.Module, ...]:
    """Networks of one base: `soup` for three of other rates and orders, or two `specialists`."""
    images, labels = digits(train=True)
    with seeded(seed):
        base = network(64, 128, 128, 128, 10)
        train(base, images, labels, epochs=5, rate=0.02)
        found: list[nn.Module] = []
        if what == "soup":
            for rate in (0.02, 0.05, 0.1):
                model = copy.deepcopy(base)
                train(model, images[:400], labels[:400], epochs=20, rate=rate)
                found.append(model)
        else:
            for turn in _TURNS:
                model = copy.deepcopy(base)
                train(model, spoiled(images, "turn", turn), labels, epochs=20, rate=0.02)
                found.append(model)
    return tuple(found)


def soup_loss(what: str, method: str, options: Mapping[str, Any]) -> float:
    """Error rate of networks of one base that are averaged.

    Args:
        what: `soup` on clean pictures, or `specialists` on those of both.
        method: The merge, or `ingredients` for the mean of the networks alone.
        options: The merge's.
    """
    images, labels = digits(train=False)
    turns = (0.0,) if what == "soup" else _TURNS
    shown = [spoiled(images, "turn", turn) if turn else images for turn in turns]

    def missed(model: nn.Module) -> float:
        return sum(error(model, one, labels) for one in shown) / len(shown)

    total = 0.0
    for seed in range(_WISE_SEEDS):
        models = cooks(seed, what)
        made = list(models) if method == "ingredients" else [merged(method, models, options)]
        total += sum(missed(one) for one in made) / len(made)
    return total / _WISE_SEEDS
