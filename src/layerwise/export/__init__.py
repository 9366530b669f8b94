"""How a transformed layer is stored: one file per format, one class each."""

from layerwise.core.format import Format
from layerwise.export.compressed_tensors import CompressedTensors
from layerwise.export.dense import Dense


def get(name: str) -> Format:
    """The format called `name`."""
    return {"dense": Dense, "compressed-tensors": CompressedTensors}[name]()
