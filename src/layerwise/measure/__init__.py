"""What a layer or a block is like, as one number: higher is more important, or more damaged.

`layerwise.measure` is also the function that scores a model: Python binds an imported room to its
package under the room's name, so the room itself can be called.
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        """Score every layer of a model; see `layerwise.api.measure`."""
        from layerwise import api

        return api.measure(*args, **options)


sys.modules[__name__].__class__ = _Room
