"""How a transformed layer is stored: one file per format, one class each."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from layerwise.core.errors import UserError
from layerwise.core.format import Format
from layerwise.core.reading.checkpoint import Source
from layerwise.export._adapter import CONFIG as ADAPTER_CONFIG
from layerwise.export.bitstack import BitStack
from layerwise.export.compressed_tensors import CompressedTensors
from layerwise.export.dense import Dense
from layerwise.export.gguf import Gguf
from layerwise.export.gptq import Gptq
from layerwise.export.layerwise import Layerwise

FORMATS: Mapping[str, type[Format]] = {
    "dense": Dense,
    "compressed-tensors": CompressedTensors,
    "gguf": Gguf,
    "gptq": Gptq,
    "layerwise": Layerwise,
    "bitstack": BitStack,
}

__all__ = ["ADAPTER_CONFIG", "FORMATS", "get", "kind"]


def get(
    name: str, source: Source, options: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
) -> Format:
    """The format called `name`, for one model.

    Args:
        name: Its name.
        source: The model.
        options: Options of the methods that make its layers, by id.

    Raises:
        UserError: There is none.
    """
    return kind(name)(source, options)


def kind(name: str) -> type[Format]:
    """The class of the format called `name`.

    Raises:
        UserError: There is none.
    """
    if name not in FORMATS:
        raise UserError(f"unknown format {name!r}.", f"Formats: {', '.join(FORMATS)}.")
    return FORMATS[name]
