"""A small convolutional net that tells handwritten digits apart, trained where it is needed."""

import copy
import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import layerwise as lw
from layerwise.core.telling.outcome import Report

SEEN, SHOWN = 1200, 100
EDGES = ("first", "last")


class Net(nn.Module):
    """Four convolutions, each with its batch norm, then a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(1, width, 3, padding=1, bias=False), _norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), _norm(width)
        self.conv3 = nn.Conv2d(width, width, 3, 2, padding=1, bias=False)
        self.norm3 = _norm(width)
        self.conv4, self.norm4 = nn.Conv2d(width, width, 3, padding=1), _norm(width)
        self.last = nn.Linear(width, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        hidden = self.norm1(self.first(pictures)).relu()
        hidden = self.norm2(self.conv2(hidden)).relu()
        hidden = self.norm3(self.conv3(hidden)).relu()
        hidden = self.norm4(self.conv4(hidden)).relu()
        return self.last(hidden.mean(dim=(2, 3)))


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width)


class Digits(NamedTuple):
    """The trained net, what it may be calibrated on, and what it is judged on."""

    net: Net
    calibration: Tensor
    held: Tensor
    labels: Tensor

    def accuracy(self, net: nn.Module) -> float:
        with torch.no_grad():
            return float((net(self.held).argmax(dim=1) == self.labels).float().mean())

    def divergence(self, net: nn.Module) -> float:
        """Mean square of the logits' error."""
        with torch.no_grad():
            return float((net(self.held) - self.net(self.held)).square().mean())


@functools.cache
def digits(width: int = 24) -> Digits:
    pixels, classes = load_digits(return_X_y=True)
    pictures = torch.tensor(pixels / 16).float().reshape(-1, 1, 8, 8)
    labels = torch.tensor(classes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net(width)
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(12):
            for part in torch.randperm(SEEN).split(64):
                loss = functional.cross_entropy(net(pictures[part]), labels[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    net.eval().requires_grad_(False)
    return Digits(net, pictures[:SHOWN], pictures[SEEN:], labels[SEEN:])


def compressed(
    made: Digits, out: Path, *, calibration: Tensor | None = None, **wish: Any
) -> tuple[Net, Report]:
    """The net with its inner layers as wished for, and the first and last at 8 bits.

    `tune` and the options are those of the wish.
    """
    shown = made.calibration if calibration is None else calibration
    plan = lw.plan(made.net, calibration=shown, **wish)
    plan = replace(
        plan,
        layers={
            name: replace(layer, bits=8, method="rtn") if name in EDGES else layer
            for name, layer in plan.layers.items()
        },
    )
    report = lw.compress(made.net, out, plan=plan, calibration=shown)
    return loaded(made.net, out), report


def loaded(net: Net, out: Path) -> Net:
    tensors: Mapping[str, Tensor] = load_file(out / "model.safetensors")
    other = copy.deepcopy(net)
    other.load_state_dict(dict(tensors))
    return other
