"""PLeaS: permute networks until they match, then fit each layer to what all of them answer."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.merging.matching import matched, permuted
from layerwise.core.reading.symmetry import Symmetry
from layerwise.core.verbs import merger
from layerwise.merge._states import Made

State = Mapping[str, Tensor]
_CARD = "card 030: one point above matching, twelve above the plain average"


@merger(
    Paper("PLeaS: Merging Models with Permutations and Least Squares", 2024, "2407.02447"),
    claims=(
        Claim("weight_matching", "digits-twins/merge", {"width": 64}, 0.17, _CARD),
        Claim("linear", "digits-twins/merge", {"width": 64}, 0.55, _CARD),
    ),
    exempt={
        "ignores_the_order_of_models": "units take the places that they have in the first model; "
        "another first gives the same function of another order of units, or a nearby one"
    },
)
def pleas(
    networks: Sequence[State],
    symmetries: Sequence[Symmetry],
    moments: Mapping[str, Tensor],
    *,
    ridge: float = 1e-3,
    seed: int = 0,
) -> State:
    """Match networks by permutation, then let each layer answer as theirs do on the mean.

    The permutations pi_k are those of weight_matching.  With z_k what a layer reads in network k,
    in the places of the first's units, and A, c the mean of the matched weights and biases,

        z     = mean_k z_k,   o = mean_k (pi_k(W_k) z_k + pi_k(b_k))
        min over W, b of E|W z + b - o|^2 + r (|W - A|^2 + |b - c|^2)
        r     = ridge mean(diag E[z z^T])

    which is solved for the change from A and c, so that networks that are one keep their weights:

        [W - A, b - c] (E[(z, 1) (z, 1)^T] + r I) = mean_k (pi_k(W_k) - A) E[z_k (z, 1)^T]

    Layers are independent of each other: one pass through all networks serves them all.  What is
    no layer is averaged; statistics of batch norms should be taken anew (`norms`).

    This is the paper's merge of one network's size, B = 1.  Unlike the paper, which runs Adam for
    400 steps, it solves in closed form, and pulls towards the matched average.  A wider network,
    1 < B <= 2, keeps units that do not match beside each other; it has other shapes than its
    parents, which a merge has not: `lw.widen` makes it of chains of linear layers.

    Args:
        networks: Tensors of every network by name.
        symmetries: Which units can change places.
        moments: By tensor of a layer, the mean over tokens of x x^T, (models in + 1, models in +
            1), with x what the layer reads in all networks, one after the other, and 1.
        ridge: How strongly the matched average pulls, as a fraction of the mean input's square.
        seed: Draws another order in which sets of units are gone through.

    Raises:
        UserError: The ridge is below 0.
    """
    if ridge < 0:
        raise UserError(f"a ridge of {ridge} is not possible.", "Give 0 or more.")
    first = networks[0]
    same = {one.name: torch.arange(one.units(first)) for one in symmetries}
    orders = [same, *(matched(first, state, symmetries, seed) for state in networks[1:])]
    last: dict[str, tuple[Tensor, Tensor | None]] = {}

    def average(name: str) -> Tensor:
        total = first[name].clone()
        for state, found in zip(networks[1:], orders[1:], strict=True):
            total += (permuted(name, state[name], symmetries, found) - first[name]).div_(
                len(networks)
            )
        return total

    def fitted(module: str) -> tuple[Tensor, Tensor | None]:
        name, bias = f"{module}.weight", f"{module}.bias"
        middle = average(name)
        weights = [
            permuted(name, state[name], symmetries, found)
            for state, found in zip(networks, orders, strict=True)
        ]
        apart = torch.stack([(one - middle).flatten(1) for one in weights])  # (models, out, in)
        columns = [_columns(name, middle, symmetries, found) for found in orders]
        change = _change(apart.double(), moments[name].double(), columns, ridge, bias in first)
        change = change.to(middle.dtype)  # (out, in [+ 1])
        wide = apart.shape[2]
        shift = average(bias) + change[:, wide] if bias in first else None
        return middle + change[:, :wide].reshape(middle.shape), shift

    def merged(name: str) -> Tensor:
        module, _, kind = name.rpartition(".")
        if f"{module}.weight" not in moments or kind not in ("weight", "bias"):
            return average(name)
        if module not in last:  # a bias comes beside its weight
            last.clear()
            last[module] = fitted(module)
        weight, shift = last[module]
        if kind == "weight":
            return weight
        assert shift is not None
        return shift

    return Made(list(first), merged)


def _columns(
    name: str, like: Tensor, symmetries: Sequence[Symmetry], found: Mapping[str, Tensor]
) -> Int64[Tensor, " in"]:
    """Which input of a network comes in each place of the first network's."""
    read = [one for one in symmetries if one.axes.get(name, 0) != 0]
    places = torch.arange(like[0].numel()).reshape(1, *like.shape[1:])
    return permuted(name, places, read, found).reshape(-1)


def _change(
    apart: Float64[Tensor, "models out in"],
    moments: Float64[Tensor, "all all"],
    columns: Sequence[Int64[Tensor, " in"]],
    ridge: float,
    biased: bool,
) -> Float64[Tensor, "out _"]:
    """What the least squares add to the mean of the weights, and of the biases behind them."""
    models, _, width = apart.shape
    places = torch.cat([width * k + one for k, one in enumerate(columns)])
    constant = torch.tensor([models * width])
    joint = moments[torch.cat([places, constant])][:, torch.cat([places, constant])]
    # E[x (z, 1)^T] with z the mean of the networks' parts of x; (models in + 1, in + 1)
    means = joint[:, :-1].reshape(-1, models, width).mean(dim=1)
    against = torch.cat([means, joint[:, -1:]], dim=1)
    own = against[:-1].reshape(models, width, width + 1)
    together = torch.cat([own.mean(dim=0), against[-1:]])  # (in + 1, in + 1)
    pull = (apart @ own).mean(dim=0)  # (out, in + 1)
    if not biased:
        together, pull = together[:-1, :-1], pull[:, :-1]
    damping = ridge * float(together.diagonal()[:width].mean())
    together.diagonal().add_(damping)
    # Directions that no input has stay as they are, without a ridge as well.
    return pull @ torch.linalg.pinv(together, hermitian=True)
