"""What several clients made of a model, as one model again: `Aggregated` out, round by round.

`layerwise.federate` is also the function that runs a study: as `layerwise.measure`, the room can
be called.
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        """Train a model at several clients; see `layerwise.api.federate`."""
        from layerwise import api

        return api.federate(*args, **options)


sys.modules[__name__].__class__ = _Room
