"""Tiny models that were tuned from one base."""

import shutil

import torch
from safetensors.torch import load_file, save_file


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def with_weights(folder, like, tensors):
    """A model directory like another one, with these tensors."""
    shutil.copytree(like, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def relatives(folder, base, count=3, dtype=torch.float32):
    """Write a base, and `count` models ever further from it; the base comes first."""
    noise = torch.Generator().manual_seed(3)
    paths = []
    for number in range(count + 1):
        tensors = {
            name: (one + number * 0.05 * torch.randn(one.shape, generator=noise)).to(dtype)
            for name, one in weights_of(base).items()
        }
        paths.append(with_weights(folder / f"m{number}", base, tensors))
    return paths
