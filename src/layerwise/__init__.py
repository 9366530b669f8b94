"""layerwise: measure, budget and rewrite the weights of trained networks, one layer at a time.

    import layerwise as lw
    lw.compress("builtin:tiny", "small", budget="3.5bits", method="gptq", symmetric=True, group=32)

The same commands as on the command line: `open`, `inspect`, `plan`, `compress`, `sweep`, `merge`,
`signature`, `evaluate`, `ensemble`, `federate`; `measure`, for scores alone; and `forecast`, which
says what carrying out a plan takes, `load`, for a model of any format, `stack`, for one that grows
and shrinks while it is in use, `patch`, for one with signatures on it, `sparsify`, for one that
leaves work out, `connect`, for what lies between two networks, and `widen`, for one that holds
both.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerwise.api import (
        compress,
        connect,
        ensemble,
        evaluate,
        federate,
        forecast,
        inspect,
        load,
        measure,
        merge,
        open,
        patch,
        plan,
        signature,
        sparsify,
        stack,
        sweep,
        widen,
    )
    from layerwise.core.errors import UserError

__all__ = [
    "UserError",
    "compress",
    "connect",
    "ensemble",
    "evaluate",
    "federate",
    "forecast",
    "inspect",
    "load",
    "measure",
    "merge",
    "open",
    "patch",
    "plan",
    "signature",
    "sparsify",
    "stack",
    "sweep",
    "widen",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, and `layerwise --help` needs none of it.
    if name == "UserError":
        from layerwise.core.errors import UserError

        return UserError
    if name in __all__:
        from layerwise import api

        return getattr(api, name)
    raise AttributeError(f"module 'layerwise' has no attribute {name!r}")
