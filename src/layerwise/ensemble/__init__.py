"""Several models that answer together, whole: by bytes, and by quantiles.

`layerwise.ensemble` is also the function that lets language models vote: as `layerwise.measure`,
the room can be called.
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        """Let models vote byte by byte; see `layerwise.api.ensemble`."""
        from layerwise import api

        return api.ensemble(*args, **options)


sys.modules[__name__].__class__ = _Room
