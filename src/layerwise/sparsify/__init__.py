"""Leave work out while a model runs: inputs of layers, channels of keys, tokens, whole blocks.

`layerwise.sparsify` is also the function that does it to a loaded model: as `layerwise.measure`,
the room can be called.
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        """Leave work out of a loaded model; see `layerwise.api.sparsify`."""
        from layerwise import api

        return api.sparsify(*args, **options)


sys.modules[__name__].__class__ = _Room
