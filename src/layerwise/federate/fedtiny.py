"""FedTiny: a sparse model found among clients: chosen by their statistics, regrown by gradients."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.errors import UserError
from layerwise.core.results import Aggregated
from layerwise.core.verbs import federator
from layerwise.federate._clients import combined, participants

# The loss of a model with some of its weights changed, over all clients.
Tried = Callable[[Mapping[str, Tensor]], float]


def _begin(
    weights: Mapping[str, Tensor],
    tried: Tried,
    generator: torch.Generator,
    *,
    density: float = 0.05,
    pool: int = 0,
) -> dict[str, dict[str, Tensor]]:
    """What the method keeps before the first round: the masks that clients lose least with.

    Candidates share out the same number of weights differently: the density of layer l is d u_l,
    u_l even in [0.5, 1.5], brought back to the whole; the first has u_l = 1.
    """
    if not 0 < density <= 1 or pool < 0:
        raise UserError(
            f"a density of {density} and a pool of {pool} candidates are none.",
            "Give a density above 0 and up to 1, and a pool of 0 or more.",
        )
    sizes = torch.tensor([float(weight.numel()) for weight in weights.values()])
    best, chosen = math.inf, {}
    for place in range(pool or max(1, round(0.1 / density))):
        drawn = torch.rand(len(sizes), generator=generator) + 0.5
        shares = torch.ones_like(sizes) if place == 0 else drawn
        densities = (density * shares * sizes.sum() / (shares * sizes).sum()).clamp(max=1)
        masks = {
            name: _largest(weight, max(1, round(float(one) * weight.numel())))
            for (name, weight), one in zip(weights.items(), densities, strict=True)
        }
        loss = tried({name: weights[name] * mask for name, mask in masks.items()})
        if loss < best or not chosen:
            best, chosen = loss, masks
    none = torch.zeros((), dtype=torch.int64)
    return {name: {"kept": mask, "rounds": none} for name, mask in chosen.items()}


@federator(
    Paper(
        "Distributed Pruning Towards Tiny Neural Networks in Federated Learning", 2023, "2212.01977"
    ),
    begins=_begin,
)
def fedtiny(
    clients: Float[Tensor, "clients ..."],
    counts: Integer[Tensor, " _"],
    grads: Float[Tensor, "clients ..."],
    place: Sequence[int],
    state: Mapping[str, Tensor],
    *,
    density: float = 0.05,
    pool: int = 0,
    every: int = 10,
    until: int = 100,
    share: float = 0.3,
) -> Aggregated:
    """Average what stays of a layer, and in its turn let other weights stay.

    Before the first round the server prunes its model by magnitude in several ways, all to the
    same density; clients run each of them, their batch-norm statistics are pooled, and the one
    with the least loss under these is taken (adaptive batch-norm selection).

    Every `every` rounds until `until` one layer is changed, those nearest the output first.  Of
    its n weights that stay, at round t,

        a = share / 2 (1 + cos(pi t / until)) n

    are given up, those of least size, for the pruned ones with the largest mean gradient; a client
    tells of its a largest only, and of the others 0 counts:

        g = sum_k (n_k / n) top_a(g_k)

    What grows begins at 0 and is not given up at once.  How many weights a layer has stays the
    same; layers without a mask are averaged by samples.  A model without batch norms is chosen by
    its loss alone.

    No official code was found.  How candidates' densities are drawn is our choice, each layer is a
    block of its own, and statistics are pooled with the spread between clients, which the paper's
    mean of variances leaves out.  The first and the last layer stay whole.

    Args:
        clients: One tensor as each client returned it.
        counts: Samples that each learned from; a client of none is left out.
        grads: Its gradient at each client, of all entries; only the a largest pruned are read.
        place: Which of the layers with a mask it is, from the output, and how many there are.
        state: The mask, and rounds done.
        density: Fraction of the weights that stay, over all layers with a mask.
        pool: Candidates; 0 for 0.1 / density of them.
        every: Rounds from one change to the next.
        until: The last round that may change anything.
        share: Fraction of a layer's weights that change at first.

    Raises:
        UserError: Nobody takes part, what came does not fit or is no number, or an option is out
            of its range.
    """
    if every < 1 or until < 0 or not 0 <= share <= 1:
        raise UserError(
            f"a change of {share} every {every} rounds until {until} is none.",
            "Give a fraction, at least one round, and an end of 0 or later.",
        )
    present, shares = participants(clients, counts)
    weight = combined(present, shares)
    if "kept" not in state:
        return Aggregated(weight)
    kept, done = state["kept"], int(state["rounds"]) + 1
    weight = weight.where(kept, 0.0)
    order, layers = place
    if done % every == 0 and done <= until and (done // every - 1) % layers == order:
        wanted = share / 2 * (1 + math.cos(math.pi * done / until)) * int(kept.sum())
        room = min(int(kept.sum()), int((~kept).sum()))
        kept = _regrown(weight, kept, grads[counts > 0], shares, min(int(wanted), room))
        weight = weight.where(kept, 0.0)
    rounds = torch.tensor(done)
    return Aggregated(weight, {"kept": kept, "rounds": rounds})


def _regrown(
    weight: Float[Tensor, "..."],
    kept: Bool[Tensor, "..."],
    grads: Float[Tensor, "clients ..."],
    shares: Float[Tensor, " clients"],
    count: int,
) -> Bool[Tensor, "..."]:
    """The mask with so many others."""
    if not count:
        return kept
    told = torch.stack(
        [grad * _largest(grad.where(~kept, 0.0), count) for grad in grads.where(~kept, 0.0)]
    )
    slope = combined(told, shares).abs().where(~kept, -1.0)
    grown = _largest(slope + 1, count)
    given_up = _largest(1 / (1 + weight.double().abs()) * kept, count)
    return (kept & ~given_up) | grown


def _largest(values: Float[Tensor, "..."], count: int) -> Bool[Tensor, "..."]:
    """Where the largest sizes are; of equal ones the first."""
    order = values.flatten().abs().sort(descending=True, stable=True).indices[:count]
    found = torch.zeros(values.numel(), dtype=torch.bool)
    found[order] = True
    return found.reshape(values.shape)
