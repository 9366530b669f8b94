"""Activation outliers for models too small to have any, without changing what the model says."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import layerwise as lw
from layerwise.core.reading.checkpoint import WEIGHTS
from layerwise.core.reading.structure import Layer
from layerwise.core.rewriting.fold import fold

CHANNELS = 3


def with_outliers(model: str, folder: Path, factor: float) -> Path:
    """Write a copy of a model in which a few inputs of its layers are large.

    A few outputs of each norm or layer that feeds others are multiplied by `factor`, and the
    columns that read them are divided by it: in exact arithmetic the model is the same function.

    Args:
        model: Path or `builtin:tiny`.
        folder: Directory to make.
        factor: How much larger the outliers are.

    Returns:
        The directory.
    """
    opened = lw.open(model)
    source, found = opened.source, opened.structure
    tensors = {name: source.read(name).float() for name in source.tensors}
    fed: dict[str, list[Layer]] = {}
    for layer in found.layers.values():
        if layer.feeder:
            fed.setdefault(layer.feeder, []).append(layer)
    generator = torch.Generator().manual_seed(0)
    for feeder, layers in fed.items():
        chosen = torch.randperm(layers[0].width, generator=generator)[:CHANNELS]
        shrink = torch.ones(layers[0].width).index_fill(0, chosen, 1 / factor)  # (in,)
        own = {name: tensors[name] for name in _tensors_of(feeder, tensors)}
        tensors |= fold(feeder, own, shrink, norm_offset=found.family.norm_offset)
        for layer in layers:
            matrix = layer.matrix(tensors[layer.tensor]) * shrink
            tensors[layer.tensor] = layer.store(matrix, source.tensors[layer.tensor].shape)
    folder.mkdir(parents=True)
    for file in source.companions:
        shutil.copyfile(file, folder / file.name)
    stored = {name: value.to(source.tensors[name].dtype) for name, value in tensors.items()}
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    return folder


def _tensors_of(module: str, tensors: dict[str, Tensor]) -> list[str]:
    return [name for name in (f"{module}.weight", f"{module}.bias") if name in tensors]
