"""Whether two networks are one but for the order of their units: what lies between them."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerwise.core.errors import UserError
from layerwise.core.merging.connectivity import alignment, distance, rise
from layerwise.core.merging.matching import matched, permuted
from layerwise.core.reading.checkpoint import module_source
from layerwise.core.reading.symmetry import symmetries
from layerwise.flow.judging import Loss
from layerwise.flow.repairing import batch_statistics


@dataclass(frozen=True, slots=True)
class Way:
    """What lies between two networks.

    Attributes:
        losses: At evenly spaced points, from the first network to the second.
        barrier: The most that one of them loses beyond the line between the two.
        distance: The length of the difference of their weights.
        alignment: R_gamma by gamma: how much alike the directions of their layers are.
    """

    losses: Sequence[float]
    barrier: float
    distance: float
    alignment: Mapping[float, float]


@dataclass(frozen=True, slots=True)
class Connection:
    """Two networks as they are, and with the units of the second in the places of the first's.

    Attributes:
        before: As they are.
        after: With the second permuted.
        matched: The tensors of the second, permuted: the same function.
    """

    before: Way
    after: Way
    matched: Mapping[str, Tensor]

    @property
    def ratio(self) -> float:
        """The distance after, as a fraction of that before; 0.0 of networks that are equal."""
        return self.after.distance / self.before.distance if self.before.distance else 0.0


def connect(
    first: nn.Module,
    second: nn.Module,
    loss: Loss,
    *,
    points: int = 11,
    gammas: Sequence[float] = (0.0, 0.3),
    norms: Tensor | None = None,
    seed: int = 0,
) -> Connection:
    """Look at the straight way between two networks before and after their weights are matched.

    Args:
        first: A network.
        second: One of the same architecture.
        loss: What a network loses.
        points: How many points of the way are looked at, both ends included.
        gammas: For which directions the alignment is told; see `connectivity.alignment`.
        norms: Inputs that statistics of batch norms are estimated again on, at each point between
            the ends; without them they are interpolated as all else.
        seed: Of the order in which units are matched.

    Raises:
        UserError: The networks differ in their tensors, or nothing is known that could be permuted
            in them.
    """
    if points < 2:
        raise UserError(f"a way of {points} points has no ends.", "Give two or more.")
    source = module_source(first)
    one, other = _floats(first), _floats(second)
    if {n: t.shape for n, t in one.items()} != {n: t.shape for n, t in other.items()}:
        raise UserError(
            "the two networks have other tensors.", "Only networks of one architecture compare."
        )
    known = symmetries(source)
    orders = matched(one, other, known, seed)
    turned = {name: permuted(name, tensor, known, orders) for name, tensor in other.items()}
    tried = copy.deepcopy(first).eval()

    def way(end: Mapping[str, Tensor]) -> Way:
        losses: list[float] = []
        for n in range(points):
            t = n / (points - 1)
            state = {name: torch.lerp(one[name], end[name], t) for name in one}
            if norms is not None and 0 < n < points - 1:
                state |= batch_statistics(source, state, norms)
            tried.load_state_dict(state, strict=False)
            losses.append(float(loss(tried)))
        ends = {gamma: alignment(one, end, gamma) for gamma in gammas}
        return Way(losses, rise(losses), distance(one, end), ends)

    return Connection(way(other), way(turned), turned)


def _floats(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: one.detach().float()
        for name, one in module.state_dict().items()
        if one.is_floating_point()
    }
