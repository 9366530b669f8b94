"""The command line.  It imports everything, late, and holds no arithmetic."""

from layerwise.cli.main import main

__all__ = ["main"]
