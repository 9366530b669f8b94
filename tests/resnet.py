"""The ResNet-20 of the assets, on the lossy copies of CIFAR-10 that lie beside it."""

import copy
import functools
import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import layerwise as lw

SHOWN, HELD = 128, 1000


class Pictures(NamedTuple):
    """The net, what it may be calibrated on, and what it is judged on."""

    net: nn.Module
    calibration: Tensor
    held: Tensor
    labels: Tensor

    def accuracy(self, net: nn.Module) -> float:
        with torch.no_grad():
            answers = torch.cat([net(part) for part in self.held.split(250)])
        return float((answers.argmax(dim=1) == self.labels).float().mean())

    def compressed(self, out: Path, **wish: Any) -> nn.Module:
        """The net with a symmetric grid for each channel."""
        lw.compress(
            self.net,
            out,
            symmetric=True,
            group=0,
            calibration=self.calibration,
            proof="none",
            **wish,
        )
        net = copy.deepcopy(self.net)
        net.load_state_dict(load_file(out / "model.safetensors"))
        return net


@functools.cache
def pictures() -> Pictures:
    if not os.environ.get("LAYERWISE_ASSETS"):
        pytest.skip("LAYERWISE_ASSETS is not set")
    assets = Path(os.environ["LAYERWISE_ASSETS"])
    folder = assets / "models/cifar10-resnet"
    found = importlib.util.spec_from_file_location("cifar_resnet", folder / "cifar_resnet.py")
    module: Any = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    net = module.load(20, folder / "resnet20.safetensors").requires_grad_(False)
    seen, held = (np.load(assets / f"cifar10/{part}_10k.npz") for part in ("train", "test"))
    labels = torch.tensor(held["y"][:HELD]).long()
    return Pictures(net, module.prep(seen["x"][:SHOWN]), module.prep(held["x"][:HELD]), labels)
