"""How broken methods are made: one for each law, so that no law can pass everything.

Every file `broken_<verb>.py` beside this one has a dict BROKEN from the name of each law in
`layerwise/testing/laws/<verb>.py` to a method that breaks it.
"""

from collections.abc import Callable
from typing import Any

from layerwise.core.catalogue import Method, Paper, Rows


def broken(
    verb: str,
    run: Callable[..., Any],
    *,
    rows: Rows = "layer",
    unit: str = "layer",
    nested: bool = False,
) -> Method:
    """A method that is in no catalogue, and so may be a function from any file."""
    paper = Paper("A mistake", 2000)
    return Method(verb, run.__name__, run, paper, (), {}, rows, unit, nested=nested)
