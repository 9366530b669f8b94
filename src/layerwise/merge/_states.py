"""Whole models as mappings of names to tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from layerwise.core.reading.structure import block_of


class Made(Mapping[str, Tensor]):
    """Tensors by name, each made when it is asked for.

    Args:
        names: The tensors, in order.
        make: What makes one.
    """

    def __init__(self, names: Sequence[str], make: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def layers_of(names: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Tensors by the layer they are in: a block of the model, or a module outside all blocks."""
    grouped: dict[str, list[str]] = {}
    for name in names:
        module = name.rpartition(".")[0]
        grouped.setdefault(block_of(name) or module or name, []).append(name)
    return grouped
