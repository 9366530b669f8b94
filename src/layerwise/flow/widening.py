"""PLeaS beyond one network's size: what does not match in two networks stays side by side."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from layerwise.core.errors import UserError
from layerwise.core.merging.matching import likenesses, matched
from layerwise.core.reading.checkpoint import module_source
from layerwise.core.reading.symmetry import symmetries

# Halvings that find how many units a budget leaves apart.
_HALVINGS = 40


@dataclass(frozen=True)
class _Units:
    """Units of a hidden layer of two networks: merged pairs, and those that stay apart."""

    first: Int64[Tensor, " merged"]
    second: Int64[Tensor, " merged"]
    only_first: Int64[Tensor, " apart"]
    only_second: Int64[Tensor, " apart"]

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many are merged, the first's alone and the second's alone."""
        return len(self.first), len(self.only_first), len(self.only_second)

    def joined(self, one: Tensor, two: Tensor) -> Tensor:
        """What both networks have of their units, along the last axis: means, then the others."""
        mean = (one[..., self.first] + two[..., self.second]) / 2
        return torch.cat([mean, one[..., self.only_first], two[..., self.only_second]], dim=-1)


class Wide(nn.Module):
    """Two classifiers in one: hidden layers that both use, and a head for each.

    Attributes:
        hidden: Linear layers over merged units, then those of the first, then of the second.
        activations: What follows each of them.
        heads: The classifiers' own last layers.
        widths: By hidden layer, units that are merged and units of either network alone.
    """

    def __init__(
        self,
        hidden: Sequence[nn.Linear],
        activations: Sequence[nn.Module],
        heads: Sequence[nn.Linear],
        units: _Units,
        widths: Sequence[tuple[int, int, int]],
    ) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(hidden)
        self.activations = nn.ModuleList(activations)
        self.heads = nn.ModuleList(heads)
        self.widths: tuple[tuple[int, int, int], ...] = tuple(widths)
        merged, alone, _ = units.counts
        for name, own, rest, start in (
            ("first", units.first, units.only_first, merged),
            ("second", units.second, units.only_second, merged + alone),
        ):
            # Where each of a network's units lies, so that its head finds them in its order.
            places = torch.empty(merged + alone, dtype=torch.long)
            places[own] = torch.arange(merged)
            places[rest] = torch.arange(start, start + len(rest))
            self.register_buffer(name, places)

    @property
    def weights(self) -> int:
        """Weights of the hidden layers, those left out that no training would fill."""
        total, alone = 0, (0, 0)
        for layer, (_, first, second) in zip(self.hidden, self.widths, strict=True):
            assert isinstance(layer, nn.Linear)
            total += layer.weight.numel() - first * alone[1] - second * alone[0]
            alone = (first, second)
        return total

    def forward(self, inputs: Tensor, task: int = 0) -> Tensor:
        """What one of the two classifiers answers.

        Args:
            inputs: What both read.
            task: 0 for the first, 1 for the second.
        """
        for layer, activation in zip(self.hidden, self.activations, strict=True):
            inputs = activation(layer(inputs))
        places = self.second if task else self.first
        assert isinstance(places, Tensor)
        return self.heads[task](inputs[..., places])


def widen(
    first: nn.Sequential,
    second: nn.Sequential,
    inputs: Tensor,
    *,
    budget: int | float = 1.5,
    ridge: float = 1e-3,
    seed: int = 0,
) -> Wide:
    """Merge two chains of linear layers into a wider one, with a head for each.

    As `merge/pleas`, but of each hidden layer's pairs of matched units only the most alike are
    merged; of the others both stay.  With r the share that stays apart, the same for all layers, a
    layer of c weights between two hidden ones has

        c ((1 + r)^2 - 2 r^2)

    of them, for what one network's own units give the other's is 0; r is the largest with which
    all hidden layers together have at most `budget` times one network's weights.  The weights
    begin as the mean where both are merged, as a network's own for its own units, and as half of
    these from its own units to merged ones; then each row is fitted by least squares, on the inputs
    it may read, to the mean answer of both networks or to its own network's.

    Unlike the paper, r is not different for each layer, which needs each one's measured accuracy
    and a solver of quadratic programs; and the least squares are solved in closed form.

    Args:
        first: Linear layers with anything between them that works unit by unit.
        second: One of the same shapes, but for the last layer's outputs.
        inputs: What both networks are shown, (examples, in); no labels.
        budget: Weights of hidden layers, as a multiple of one network's, from 1 to 2.
        ridge: How strongly the weights they begin as pull, as a fraction of the mean input's
            square.
        seed: Draws another order in which units are matched.

    Raises:
        UserError: The budget is out of range, or the networks are no such chains.
    """
    if not 1 <= budget <= 2:
        raise UserError(f"a budget of {budget} is not possible.", "Give 1 to 2.")
    layers = [_linear(one) for one in (first, second)]
    shapes = [[(len(part.weight), part.in_features) for part in chain[:-1]] for chain in layers]
    if shapes[0] != shapes[1] or len(layers[0]) < 2:
        raise UserError(
            "the two networks are no chains of linear layers of the same hidden widths.",
            "Give two nn.Sequential of linear layers, with a hidden one at least.",
        )
    hidden = shapes[0]
    found = _paired(first, second, layers, seed)
    apart = _apart(hidden, budget)
    units = [_split(*pair, round_down) for pair, round_down in zip(found, apart, strict=True)]
    everything = torch.arange(hidden[0][1])
    none = torch.empty(0, dtype=torch.long)
    sides = [_Units(everything, everything, none, none), *units]
    made: list[nn.Linear] = []
    between = [_after(one) for one in (first, second)]
    seen = [inputs, inputs]
    with torch.no_grad():
        for place, (reads, writes) in enumerate(itertools.pairwise(sides)):
            pair = [chain[place] for chain in layers]
            answers = [layer(x) for layer, x in zip(pair, seen, strict=True)]
            made.append(_fitted(pair, seen, answers, reads, writes, ridge))
            seen = [after[place](x) for after, x in zip(between, answers, strict=True)]
    heads = [copy.deepcopy(chain[-1]) for chain in layers]
    widths = [one.counts for one in units]
    activations = [copy.deepcopy(one) for one in between[0]]
    return Wide(made, activations, heads, units[-1], widths).eval()


def _linear(chain: nn.Sequential) -> list[nn.Linear]:
    return [part for part in chain if isinstance(part, nn.Linear)]


def _after(chain: nn.Sequential) -> list[nn.Sequential]:
    """What follows each linear layer but the last."""
    found: list[nn.Sequential] = []
    for part in chain:
        if isinstance(part, nn.Linear):
            found.append(nn.Sequential())
        elif found:
            found[-1].append(part)
    return found[:-1]


def _paired(
    first: nn.Sequential, second: nn.Sequential, layers: Sequence[Sequence[nn.Linear]], seed: int
) -> list[tuple[Tensor, Tensor]]:
    """For each hidden layer the second's unit of each of the first's, and how alike they are."""
    # Heads that answer other questions say nothing of which units are alike.
    states = [
        {
            f"{n}.{kind}": one.detach()
            for n, part in enumerate(chain[:-1])
            for kind, one in part.named_parameters()
        }
        for chain in layers
    ]
    if layers[0][-1].weight.shape == layers[1][-1].weight.shape:
        for state, chain in zip(states, layers, strict=True):
            state[f"{len(chain) - 1}.weight"] = chain[-1].weight.detach()
    chain = nn.Sequential(*(copy.deepcopy(part) for part in layers[0]))
    known = [
        replace(one, axes={name: axis for name, axis in one.axes.items() if name in states[0]})
        for one in symmetries(module_source(chain))
    ]
    orders = matched(states[0], states[1], known, seed)
    alike = likenesses(states[0], states[1], known, orders)
    return [(orders[one.name], alike[one.name]) for one in known]


def _apart(hidden: Sequence[tuple[int, int]], budget: int | float) -> list[int]:
    """How many units of each hidden layer stay apart."""
    base = sum(rows * width for rows, width in hidden)

    def counts(share: float) -> list[int]:
        return [int(share * rows) for rows, _ in hidden]

    def weights(share: float) -> int:
        total, before = 0, 0
        for (rows, width), alone in zip(hidden, counts(share), strict=True):
            total += (rows + alone) * (width + before) - 2 * alone * before
            before = alone
        return total

    low, high = 0.0, 1.0
    if weights(high) <= budget * base:
        return counts(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if weights(middle) <= budget * base else (low, middle)
    return counts(low)


def _split(order: Tensor, alike: Tensor, alone: int) -> _Units:
    """The most alike pairs merged, and so many others apart."""
    ranked = alike.sort(stable=True).indices
    kept, rest = ranked[alone:].sort().values, ranked[:alone].sort().values
    return _Units(kept, order[kept], rest, order[rest])


def _fitted(
    pair: Sequence[nn.Linear],
    seen: Sequence[Tensor],
    answers: Sequence[Tensor],
    reads: _Units,
    writes: _Units,
    ridge: float,
) -> nn.Linear:
    """A layer over the units of both networks."""
    inputs = reads.joined(*(one.double() for one in seen))
    wanted = writes.joined(*(one.double() for one in answers))
    weight, bias = _begun(pair, reads, writes)
    merged, ones, twos = reads.counts
    rows, ones_out, _ = writes.counts
    own = torch.arange(merged + ones)
    other = torch.cat([torch.arange(merged), torch.arange(merged + ones, merged + ones + twos)])
    groups = (
        (slice(0, rows), torch.arange(merged + ones + twos)),
        (slice(rows, rows + ones_out), own),
        (slice(rows + ones_out, None), other),
    )
    pull = ridge * float(inputs.square().mean())
    for out, columns in groups:
        part = inputs[:, columns]
        if bias is not None:
            part = torch.cat([part, part.new_ones(len(part), 1)], dim=1)
        here = weight[out][:, columns]
        here = here if bias is None else torch.cat([here, bias[out, None]], dim=1)
        left = wanted[:, out] - part @ here.T
        gram = part.T @ part / len(part)
        gram.diagonal().add_(pull)
        change = torch.linalg.pinv(gram, hermitian=True) @ (part.T @ left / len(part))
        weight[out, columns] += change.T[:, : len(columns)]
        if bias is not None:
            bias[out] += change[-1]
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight.copy_(weight)
    if bias is not None:
        made.bias.copy_(bias)
    return made


def _begun(
    pair: Sequence[nn.Linear], reads: _Units, writes: _Units
) -> tuple[Float64[Tensor, "out in"], Float64[Tensor, " out"] | None]:
    """The layer before it is fitted."""
    one, two = (layer.weight.double() for layer in pair)
    empty = torch.zeros(len(writes.only_first), len(reads.only_second)).double()
    blank = torch.zeros(len(writes.only_second), len(reads.only_first)).double()
    a, b, c, d = writes.first, writes.second, writes.only_first, writes.only_second
    i, j, k, m = reads.first, reads.second, reads.only_first, reads.only_second
    weight = torch.cat(
        [
            torch.cat([(one[a][:, i] + two[b][:, j]) / 2, one[a][:, k] / 2, two[b][:, m] / 2], 1),
            torch.cat([one[c][:, i], one[c][:, k], empty], 1),
            torch.cat([two[d][:, j], blank, two[d][:, m]], 1),
        ]
    )
    biases = [dict(layer.named_parameters()).get("bias") for layer in pair]
    if biases[0] is None or biases[1] is None:
        return weight, None
    return weight, writes.joined(biases[0].double(), biases[1].double())
