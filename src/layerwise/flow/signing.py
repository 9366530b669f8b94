"""Signatures: take one from three models, and put some on a module and off again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from layerwise.core.errors import UserError
from layerwise.core.merging.signatures import (
    Signature,
    check_fits,
    depth_order,
    kept_tensors,
    read_signature,
    taken,
)
from layerwise.core.reading.checkpoint import Source, TensorInfo, open_source
from layerwise.core.reading.parents import parents
from layerwise.core.running.apply import check_finite

Model = str | Path | nn.Module


def sign(
    start: Model,
    clean: Model,
    changed: Model,
    *,
    layers: int = 0,
    pattern: str = "",
    bits: int = 0,
    label: str = "",
) -> Signature:
    """What a network tuned to corrupted data learned that one tuned to clean data did not.

    Args:
        start: The model that both were tuned from.
        clean: Tuned to clean data.
        changed: Tuned to corrupted data.
        layers: How many layers are kept, from the shallowest; 0 for half of them, rounded up.
        pattern: Which tensors are kept instead.
        bits: Round each tensor to so many bits; 0 for none.
        label: What the signature is called.

    Raises:
        UserError: The models are of different architectures, there are not so many layers, or one
            holds NaN.
    """
    ground, plain, other = (open_source(one) for one in (start, clean, changed))
    parents([plain, other], ground)  # refuses what does not fit
    floats = {n: one for n, one in ground.tensors.items() if one.dtype.is_floating_point}
    shapes = {name: one.shape for name, one in floats.items()}
    kept = frozenset(kept_tensors(shapes, layers, pattern))
    of_layer = {name: layer for layer, names in depth_order(shapes).items() for name in names}
    apart = {layer: [0.0, 0.0] for layer in dict.fromkeys(of_layer.values())}
    sources = [_Floats(one, floats) for one in (ground, plain, other)]
    made: dict[str, Tensor] = {}
    for name in floats:
        if name in kept:
            made[name] = taken(name, *sources)
        if name in of_layer:
            before, after = sources[1][name], sources[2][name]
            sums = apart[of_layer[name]]
            sums[0] += float((after - before).double().square().sum())
            sums[1] += float(before.double().square().sum())
    ratios = {name: (far / size) ** 0.5 if size else 0.0 for name, (far, size) in apart.items()}
    found = Signature(label or other.label, made, ratios)
    return found.rounded(bits) if bits else found


class _Floats(Mapping[str, Tensor]):
    """Tensors of a model by name, in float32, read when they are asked for."""

    def __init__(self, source: Source, names: Mapping[str, TensorInfo]) -> None:
        self._source = source
        self._names = names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        found = self._source.read(name).float()
        check_finite(f"{name} of {self._source.label}", found)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass
class Patch:
    """Signatures that are on a module; `remove`, or the end of a `with` block, takes them off.

    Attributes:
        module: The module.
        kept: Its tensors as they were before.
    """

    module: nn.Module
    kept: dict[str, Tensor]

    def remove(self) -> None:
        """Give the module back the very bits that it had; a second time does nothing."""
        held = self.module.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, one in self.kept.items():
                held[name].copy_(one)
        self.kept.clear()

    def __enter__(self) -> nn.Module:
        return self.module

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def patch(
    module: nn.Module,
    signatures: Sequence[Signature | str | Path],
    strengths: Sequence[float] | None = None,
) -> Patch:
    """Add signatures to a module in memory, which keeps what they change as it was.

        W = W_t + sum_c s_c RWS_c

    Patches that lie on each other are removed in the opposite order.

    Args:
        module: Of the architecture that they were taken from; it is changed.
        signatures: Signatures, or their files.
        strengths: Times each; by default one over their number.

    Raises:
        UserError: One does not fit the module, or there is not a strength for each; the module is
            as it was.
    """
    read = [one if isinstance(one, Signature) else read_signature(Path(one)) for one in signatures]
    times = [1 / len(read)] * len(read) if strengths is None else list(strengths)
    if len(times) != len(read) or not read:
        raise UserError(
            f"{len(times)} strengths were given for {len(read)} signatures.",
            "Give one or more signatures, and a strength for each or none.",
        )
    held = module.state_dict(keep_vars=True)
    for one in read:
        shapes = {name: tuple(there.shape) for name, there in held.items()}
        check_fits(one, shapes, type(module).__name__)
    names = dict.fromkeys(name for one in read for name in one.tensors)
    kept = {name: held[name].detach().clone() for name in names}
    with torch.no_grad():
        for name, before in kept.items():
            total = before.float()
            for one, strength in zip(read, times, strict=True):
                if name in one.tensors:
                    total = total + strength * one.tensors[name].to(total.device)
            held[name].copy_(total)
    return Patch(module, kept)
