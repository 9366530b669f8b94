"""A small task that is learned from examples in the sequence, or from those of training.

Reddy 2024 (arXiv:2312.03002): a network is shown items with their labels and then an item alone,
whose label it must give.  Where it has seen that item in the sequence it can copy the label there.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from layerwise.training.in_context import Sequences


@dataclass(frozen=True)
class Task:
    """Items of classes, and a label for each class.

    A class k has the mean mu_k, a label has a vector; both are drawn from N(0, I / D).  An item is
    (mu_k + noise eta) / sqrt(1 + noise^2), eta ~ N(0, I / D).  A sequence is N items with the label
    of each behind it, and the target.  Every token is the place where it stands, one-hot and moved
    by a random number of places, and its vector.

    Attributes:
        pairs: N, items with labels in a sequence.
        classes: K.
        labels: L; class k has label k mod L.
        width: D, numbers of an item.
        noise: How far items of a class lie apart.
        bursts: B, how often a class comes in a sequence whose target is among its items; 0 where
            items and target are drawn apart.
        places: Places there are.
        seed: Of the means.
    """

    pairs: int = 4
    classes: int = 256
    labels: int = 8
    width: int = 31
    noise: float = 0.1
    bursts: int = 2
    places: int = 33
    seed: int = 0

    def __post_init__(self) -> None:
        """Draw what stays."""
        draw = torch.Generator().manual_seed(self.seed)
        scale = self.width**-0.5
        means = scale * torch.randn(self.classes, self.width, generator=draw)
        vectors = scale * torch.randn(self.labels, self.width, generator=draw)
        object.__setattr__(self, "_means", means)
        object.__setattr__(self, "_vectors", vectors)

    @property
    def size(self) -> int:
        """Numbers of a token."""
        return self.places + self.width

    def sequences(
        self,
        count: int,
        draw: torch.Generator,
        *,
        novel: bool = False,
        flipped: bool = False,
        bursts: int | None = None,
    ) -> tuple[Float[Tensor, "count length size"], Sequences]:
        """Some sequences, and what stands in them.

        Args:
            count: How many.
            draw: Draws them.
            novel: Their classes are new ones, each with a label at random.
            flipped: Each class has the label after its own.
            bursts: Instead of the task's own.
        """
        often = self.bursts if bursts is None else bursts
        # Of new classes a sequence needs no more than it has items.
        classes = self.pairs + 1 if novel else self.classes
        items, target = _drawn(count, self.pairs, classes, often, draw)
        shown = torch.cat([items, target[:, None]], dim=1)  # (count, pairs + 1)
        if novel:
            means = self.width**-0.5 * torch.randn(count, classes, self.width, generator=draw)
            centre = means.gather(1, shown[..., None].expand(-1, -1, self.width))
            given = torch.randint(self.labels, (count, classes), generator=draw)
            labels = given.gather(1, shown)
        else:
            centre, labels = self._means[shown], (shown + flipped) % self.labels  # type: ignore[attr-defined]
        eta = self.width**-0.5 * torch.randn(centre.shape, generator=draw)
        vectors = (centre + self.noise * eta) / (1 + self.noise**2) ** 0.5
        told = self._vectors[labels]  # type: ignore[attr-defined]
        content = torch.stack([vectors, told], dim=2).flatten(1, 2)[:, :-1]  # (count, 2 N + 1, D)
        length = content.shape[1]
        shift = torch.randint(self.places - length + 1, (count, 1), generator=draw)
        place = functional.one_hot(shift + torch.arange(length), self.places).float()
        return torch.cat([place, content], dim=2), Sequences(
            items, target, labels[:, :-1], labels[:, -1]
        )


def _drawn(
    count: int, pairs: int, classes: int, bursts: int, draw: torch.Generator
) -> tuple[Int64[Tensor, "count pairs"], Int64[Tensor, " count"]]:
    """The classes of items, and of targets."""
    if not bursts:
        drawn = torch.randint(classes, (count, pairs + 1), generator=draw)
        return drawn[:, :-1], drawn[:, -1]
    distinct = pairs // bursts
    drawn = torch.randint(classes, (count, distinct), generator=draw)
    while bool((twice := (drawn.sort(dim=1).values.diff(dim=1) == 0).any(dim=1)).any()):
        drawn[twice] = torch.randint(classes, (int(twice.sum()), distinct), generator=draw)
    order = torch.rand(count, pairs, generator=draw).argsort(dim=1)
    items = drawn.repeat(1, bursts).gather(1, order)
    chosen = torch.randint(distinct, (count, 1), generator=draw)
    return items, drawn.gather(1, chosen)[:, 0]


class Attention(nn.Module):
    """One head of causal attention, added to the stream."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.query, self.key = (nn.Linear(size, inner, bias=False) for _ in range(2))
        self.value = nn.Linear(size, size, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        """The stream and what it attends to."""
        asked, kept, told = (one(stream)[:, None] for one in (self.query, self.key, self.value))
        given = functional.scaled_dot_product_attention(asked, kept, told, is_causal=True)
        return stream + given[:, 0]


class Network(nn.Module):
    """Two layers of attention and a classifier of the last token."""

    def __init__(self, task: Task, inner: int = 64) -> None:
        super().__init__()
        self.attention = nn.ModuleList(Attention(task.size, inner) for _ in range(2))
        sides = [task.size, 128, 128, 128]
        parts = [
            part
            for before, after in itertools.pairwise(sides)
            for part in (nn.Linear(before, after), nn.ReLU())
        ]
        self.classifier = nn.Sequential(*parts, nn.Linear(128, task.labels))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the target's label."""
        for layer in self.attention:
            tokens = layer(tokens)
        return self.classifier(tokens[:, -1])


def train(
    task: Task,
    *,
    seed: int = 0,
    steps: int = 20_000,
    batch: int = 128,
    rate: float = 1e-3,
    seen: Callable[[Network, int], bool] = lambda network, step: False,
) -> Network:
    """Train a network on a task by Adam.

    Args:
        task: The task.
        seed: Of the network and the sequences.
        steps: Most steps.
        batch: Sequences of a step.
        rate: Of learning.
        seen: Is shown the network after each step; True ends the training.
    """
    draw = torch.Generator().manual_seed(1000 + seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Network(task)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    for step in range(1, steps + 1):
        tokens, told = task.sequences(batch, draw)
        loss = functional.cross_entropy(network(tokens), told.answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if seen(network, step):
            break
    return network
