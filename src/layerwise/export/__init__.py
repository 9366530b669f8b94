"""How a transformed layer is stored: one file per format, one class each."""

from collections.abc import Callable, Mapping

from layerwise.core.errors import UserError
from layerwise.core.format import Format
from layerwise.export.compressed_tensors import CompressedTensors
from layerwise.export.dense import Dense
from layerwise.export.layerwise import Layerwise

FORMATS: Mapping[str, Callable[[], Format]] = {
    "dense": Dense,
    "compressed-tensors": CompressedTensors,
    "layerwise": Layerwise,
}


def get(name: str) -> Format:
    """The format called `name`.

    Raises:
        UserError: There is none.
    """
    if name not in FORMATS:
        raise UserError(f"unknown format {name!r}.", f"Formats: {', '.join(FORMATS)}.")
    return FORMATS[name]()
