"""What a federation is tried on: images and labels, networks, and how clients share them."""

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from layerwise.core.errors import UserError
from layerwise.core.extras import need

ASSETS = "LAYERWISE_ASSETS"
STUDIES = ("digits", "mnist", "cifar10")
NETWORKS = ("mlp", "cnn")
# Of the two data sets in the assets, so that a study takes a minute on two cores.
_IMAGES, _TESTED = 2000, 1000
WIDTH = 64  # features that the head reads; of a projection too


@dataclass(frozen=True, slots=True)
class Study:
    """Images and labels.

    Attributes:
        name: What reports call it.
        images: What clients share, (images, channels, height, width), from 0 to 1.
        labels: Their classes, (images,).
        test_images: What nobody learns from.
        test_labels: Their classes.
        classes: How many there are.
    """

    name: str
    images: Float[Tensor, "images channels height width"]
    labels: Int64[Tensor, " images"]
    test_images: Float[Tensor, "tested channels height width"]
    test_labels: Int64[Tensor, " tested"]
    classes: int = 10


def study_of(name: str, seed: int = 0) -> Study:
    """One of the studies by name.

    Args:
        name: `digits` of scikit-learn; `mnist` or `cifar10` of the folder $LAYERWISE_ASSETS.
        seed: Which images of `digits` are for training, 70% of them.

    Raises:
        UserError: There is none of that name, or its data is not here.
    """
    if name not in STUDIES:
        raise UserError(f"there is no study {name!r}.", f"Studies: {', '.join(STUDIES)}.")
    if name == "digits":
        return _digits(seed)
    files = {"mnist": ("mnist/mnist.npz",), "cifar10": _CIFAR}[name]
    folder = os.environ.get(ASSETS, "")
    if not folder or not all((Path(folder) / file).exists() for file in files):
        raise UserError(
            f"the study {name} reads {files[0]} of the folder that ${ASSETS} names.",
            f"Set {ASSETS}, or use the study digits.",
        )
    loaded = [np.load(Path(folder) / file) for file in files]
    names = ("x_train", "y_train", "x_test", "y_test") if name == "mnist" else ("x", "y") * 2
    arrays = [loaded[place // 2 % len(loaded)][part] for place, part in enumerate(names)]
    images, labels, tested, answers = arrays
    return Study(
        name,
        _pictures(images[:_IMAGES]),
        torch.tensor(labels[:_IMAGES]).long(),
        _pictures(tested[:_TESTED]),
        torch.tensor(answers[:_TESTED]).long(),
    )


_CIFAR = ("cifar10/train_10k.npz", "cifar10/test_10k.npz")


def _digits(seed: int) -> Study:
    datasets = need("sklearn.datasets", "the study digits")
    pixels, classes = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(pixels))
    images = torch.tensor(pixels[order] / 16).float().reshape(-1, 1, 8, 8)
    labels, trained = torch.tensor(classes[order]).long(), round(0.7 * len(pixels))
    return Study("digits", images[:trained], labels[:trained], images[trained:], labels[trained:])


def _pictures(pixels: Any) -> Float[Tensor, "images channels height width"]:
    images = torch.tensor(pixels).float() / 255
    return images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()


def network(study: Study, kind: str, learning: str, seed: int) -> nn.Module:
    """A network for a study: a body, and a head that reads its features.

    Args:
        study: What it sees.
        kind: `mlp`, of two hidden layers without normalisation; `cnn`, of three convolutions with
            batch norms.
        learning: The head names classes if `supervised`, and projects if `contrastive`.
        seed: Of its weights.

    Raises:
        UserError: There is no such kind.
    """
    if kind not in NETWORKS:
        raise UserError(f"there is no network {kind!r}.", f"Networks: {', '.join(NETWORKS)}.")
    channels, height, side = study.images.shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body, features = _mlp(channels * height * side) if kind == "mlp" else _cnn(channels)
        head: nn.Module = nn.Linear(features, study.classes)
        if learning == "contrastive":
            head = nn.Sequential(nn.Linear(features, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        return nn.Sequential(OrderedDict(body=body, head=head))


def _mlp(pixels: int) -> tuple[nn.Module, int]:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(pixels, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()
    ), WIDTH


def _cnn(channels: int) -> tuple[nn.Module, int]:
    widths = (channels, 24, 48, 72)
    layers: list[nn.Module] = []
    for stride, before, after in zip((1, 2, 2), widths, widths[1:], strict=False):
        layers += [
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten()), 4 * widths[-1]


def held_back(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Places of about so many samples, each class alike, and of the others.

    Raises:
        UserError: There are not so many.
    """
    if not 0 <= count < len(labels):
        raise UserError(
            f"{count} of {len(labels)} samples cannot be held back.", "Hold fewer back."
        )
    order = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(len(labels)))
    classes = int(labels.max()) + 1
    taken = torch.zeros(len(labels), dtype=torch.bool)
    for one in range(classes):
        mine = order[labels[order] == one]
        taken[mine[: count // classes + (one < count % classes)]] = True
    return taken.nonzero().flatten(), (~taken).nonzero().flatten()


def shared_out(labels: Tensor, clients: int, alpha: float, seed: int) -> Sequence[Tensor]:
    """Who gets which samples: the fewer a class's clients, the smaller alpha.

    Each class is cut in proportions drawn from a Dirichlet distribution over the clients; a client
    may be left with nothing.

    Args:
        labels: Class of each sample.
        clients: How many share them.
        alpha: 0.1 is skewed badly, 100 hardly at all.
        seed: Of what is drawn.

    Raises:
        UserError: There is no client, or alpha is not above 0.
    """
    if clients < 1 or not alpha > 0:
        raise UserError(
            f"{clients} clients with alpha {alpha} share nothing.",
            "Give at least one client and an alpha above 0.",
        )
    random = np.random.default_rng([seed, 2])
    shares: list[list[int]] = [[] for _ in range(clients)]
    for one in range(int(labels.max()) + 1):
        mine = random.permutation((labels == one).nonzero().flatten().numpy())
        ends = np.cumsum(random.dirichlet(np.full(clients, alpha)))[:-1] * len(mine)
        for share, part in zip(shares, np.split(mine, ends.round().astype(int)), strict=True):
            share.extend(part.tolist())
    return [torch.tensor(sorted(share), dtype=torch.long) for share in shares]


def settled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that nothing else changes."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
