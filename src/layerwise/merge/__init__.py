"""Several models into one.

`layerwise.merge` is also the function that merges models: Python binds an imported room to its
package under the room's name, so the room itself can be called.
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        """Merge models; see `layerwise.api.merge`."""
        from layerwise import api

        return api.merge(*args, **options)


sys.modules[__name__].__class__ = _Room
