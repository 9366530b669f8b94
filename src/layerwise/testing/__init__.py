"""Laws every method obeys, for this project's methods and for anyone else's."""

from layerwise.testing.check import Law, check, laws, laws_in

__all__ = ["Law", "check", "laws", "laws_in"]
