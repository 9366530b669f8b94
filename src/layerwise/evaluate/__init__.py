"""How good a model still is: on text, on tasks, on images; against the one it was made from.

`layerwise.evaluate` is also the function that does it: as `layerwise.measure`, the room can be
called.
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        """Evaluate a model; see `layerwise.api.evaluate`."""
        from layerwise import api

        return api.evaluate(*args, **options)


sys.modules[__name__].__class__ = _Room
