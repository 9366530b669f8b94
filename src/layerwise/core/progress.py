"""What long work tells whoever watches it."""

from typing import Protocol


class Progress(Protocol):
    """Told of each stage, and of each step inside it."""

    def stage(self, name: str, steps: int) -> None:
        """A stage with so many steps begins."""
        ...

    def step(self, what: str) -> None:
        """One step is done."""
        ...

    def tell(self, line: str) -> None:
        """Something is known that whoever waits should read."""
        ...


class Silent:
    """Tells nobody."""

    def stage(self, name: str, steps: int) -> None:
        """Say nothing."""

    def step(self, what: str) -> None:
        """Say nothing."""

    def tell(self, line: str) -> None:
        """Say nothing."""
