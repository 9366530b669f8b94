"""One small classifier of digits that was tuned to three kinds of pictures: what merges are for."""

import copy
import functools
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
# Pictures that the base has seen a little of, one expert for each of the first three, and others.
_SEEN = (("turn", 40), ("turn", -40), ("turn", 15), ("down", 1), ("noise", 0.2))
_TASKS = (("turn", 20), ("turn", -20), ("right", 1))
_UNSEEN = (("down", 1), ("turn", 35), ("noise", 0.3))
_SHOWN = 256


def experts_loss(method: str, options: Mapping[str, Any], *, unseen: bool = False) -> float:
    """Error rate of the merged model over the three tasks, mean of three seeds.

    Args:
        method: The merge.
        options: Its options; those it does not have are left out.
        unseen: Over three kinds of pictures that no expert was tuned to instead.
    """
    return sum(_loss(seed, method, options, unseen) for seed in range(SEEDS)) / SEEDS


def _loss(seed: int, method: str, options: Mapping[str, Any], unseen: bool) -> float:
    base, experts = trained(seed)
    chosen = catalogue.get(f"merge/{method}")
    reads = {"grams", "fishers"} & set(chosen.evidence)
    needs = {"base", "origin"} & set(chosen.evidence)
    with tempfile.TemporaryDirectory() as folder:
        api.merge(
            experts,
            Path(folder) / "out",
            base=base if needs else None,
            method=method,
            options=chosen.accepts(options),
            calibration=[pictures(kind, train=True)[0] for kind in _TASKS] if reads else None,
            samples=_SHOWN,
        )
        merged = api.load(Path(folder) / "out", into=base)
    return sum(error(merged, kind) for kind in (_UNSEEN if unseen else _TASKS)) / 3


def error(model: nn.Module, kind: tuple[str, float]) -> float:
    """Share of the test pictures of a kind that are misclassified."""
    images, labels = pictures(kind, train=False)
    with torch.no_grad():
        return float((model(images).argmax(dim=1) != labels).float().mean())


@functools.cache
def trained(seed: int) -> tuple[nn.Sequential, Sequence[nn.Sequential]]:
    """A base, and a copy tuned to each task."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sides = (64, 128, 128, 128, 10)
        parts: list[nn.Module] = []
        for rows, width in zip(sides[1:], sides[:-1], strict=True):
            parts += [nn.Linear(width, rows), nn.ReLU()]
        base = nn.Sequential(*parts[:-1])
        seen = [pictures(kind, train=True) for kind in (("turn", 0), *_SEEN)]
        _train(base, torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen]), 3, 0.01)
        experts: list[nn.Sequential] = []
        for kind in _TASKS:
            expert = copy.deepcopy(base)
            _train(expert, *pictures(kind, train=True), 20, 0.03)
            experts.append(expert.requires_grad_(False).eval())
    return base.requires_grad_(False).eval(), experts


def _train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            loss = functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@functools.cache
def pictures(kind: tuple[str, float], *, train: bool) -> tuple[Tensor, Tensor]:
    """Digits turned, shifted or made noisy, (pictures, 64), and their classes."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    pixels, classes = load_digits(return_X_y=True)
    part = slice(0, 1200) if train else slice(1200, None)
    images: Any = np.asarray(pixels[part], dtype=np.float32).reshape(-1, 8, 8) / 16
    what, amount = kind
    if what == "turn":
        images = ndimage.rotate(images, amount, axes=(1, 2), reshape=False, order=1)
    elif what == "noise":
        drawn = np.random.default_rng(0).normal(0, amount, images.shape)
        images = images + drawn.astype(np.float32)
    else:
        images = np.roll(images, int(amount), axis=2 if what == "right" else 1)
    flat = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32)).reshape(-1, 64)
    return flat, torch.from_numpy(np.asarray(classes[part], dtype=np.int64))


# Pictures of each task that coefficients are chosen on; the others of the test pictures judge.
_CHOSEN_ON = 60
_SCALES = [n / 20 for n in range(1, 31)]


def searched_loss(method: str, options: Mapping[str, Any]) -> float:
    """Error rate over the three tasks of a merge whose coefficients were chosen on 60 of each.

    Args:
        method: The merge that searches, or `one` for the best of 30 scales of task arithmetic that
            are the same for all models and layers.
        options: The merge's.
    """
    total = 0.0
    for seed in range(SEEDS):
        base, experts = trained(seed)
        shown = [pictures(kind, train=False) for kind in _TASKS]

        def loss(model: nn.Module, shown: Sequence[tuple[Tensor, Tensor]] = shown) -> float:
            with torch.no_grad():
                parts = [
                    functional.cross_entropy(model(x[:_CHOSEN_ON]), y[:_CHOSEN_ON])
                    for x, y in shown
                ]
            return float(sum(parts)) / len(parts)

        if method == "one":
            tried = [_scaled(base, experts, scale) for scale in _SCALES]
            model: nn.Module = min(tried, key=loss)
        else:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                api.merge(experts, out, base=base, method=method, options=options, loss=loss)
                model = api.load(out, into=base)
        missed = [(model(x).argmax(dim=1) != y)[_CHOSEN_ON:].float().mean() for x, y in shown]
        total += float(sum(missed)) / len(missed)
    return total / SEEDS


def _scaled(base: nn.Module, experts: Sequence[nn.Module], scale: float) -> nn.Module:
    made = copy.deepcopy(base)
    states = [one.state_dict() for one in experts]
    made.load_state_dict(
        {
            name: one + scale * sum(state[name] - one for state in states)
            for name, one in base.state_dict().items()
        }
    )
    return made
