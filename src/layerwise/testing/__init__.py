"""Laws every method obeys, for this project's methods and for anyone else's."""

from layerwise.testing.check import Law, check, laws_in, laws_of, verdicts

__all__ = ["Law", "check", "laws_in", "laws_of", "verdicts"]
