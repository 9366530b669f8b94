"""What a client does with its own samples, and how the model that comes of all is judged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from layerwise.core.errors import UserError
from layerwise.core.telling.rounds import Reply
from layerwise.flow.studies import settled

LEARNINGS = ("supervised", "contrastive")


@dataclass(frozen=True, slots=True)
class Local:
    """How a client learns: stochastic gradient descent, its momentum new every round.

    Attributes:
        epochs: Passes over its samples in a round.
        batch: Samples in a step; a last one alone is left out.
        rate: Learning rate of the first round.
        decay: Factor of the rate from round to round.
        momentum: Of the descent.
        weight_decay: Of the descent.
        proximal: mu of FedProx: mu / 2 ||w - W||^2 is added to the loss.
        learning: `supervised`: cross-entropy of the labels; `contrastive`: SimCLR, no labels.
        temperature: Of the contrastive loss.
    """

    epochs: int = 5
    batch: int = 32
    rate: float = 0.05
    decay: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    proximal: float = 0.0
    learning: str = "supervised"
    temperature: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what is no training.

        Raises:
            UserError: A number is out of its range, or the kind of learning is unknown.
        """
        wrong = {
            "epochs": self.epochs < 0,
            "batch": self.batch < 2,
            "rate": not self.rate > 0,
            "decay": not self.decay > 0,
            "momentum": not 0 <= self.momentum < 1,
            "weight_decay": not self.weight_decay >= 0,
            "proximal": not self.proximal >= 0,
            "temperature": not self.temperature > 0,
            "learning": self.learning not in LEARNINGS,
        }
        if named := [name for name, bad in wrong.items() if bad]:
            raise UserError(
                f"clients cannot learn with {named[0]} {getattr(self, named[0])}.",
                f"Learning is one of {', '.join(LEARNINGS)}; a batch has two samples or more, and "
                "the other numbers are above 0 where 0 means nothing.",
            )


def seed_of(*numbers: int) -> int:
    """A seed of its own for each round and client, whoever else takes part."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def train(
    module: nn.Module,
    sent: Mapping[str, Tensor],
    images: Float[Tensor, "images channels height width"],
    labels: Int64[Tensor, " images"],
    how: Local,
    *,
    round: int = 0,
    seed: int = 0,
    kept: Mapping[str, Bool[Tensor, "..."]] | None = None,
    slopes: bool = False,
) -> Reply:
    """Learn from one client's samples, beginning at the global model.

    Args:
        module: The network; what is in it does not count.
        sent: The global model.
        images: The client's samples.
        labels: Their classes.
        how: How it learns.
        round: Which round it is, from 0.
        seed: Of the order of samples, and of what is done to images.
        kept: Masks of parameters, by name: what is False stays zero.
        slopes: Tell the gradients of the parameters too, of one batch at the end.
    """
    module.load_state_dict(settled(sent))
    anchors = [parameter.detach().clone() for parameter in module.parameters()]
    masks = kept or {}
    descent = torch.optim.SGD(
        module.parameters(),
        lr=how.rate * how.decay**round,
        momentum=how.momentum,
        weight_decay=how.weight_decay,
    )
    told: list[float] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module.train()
        for _ in range(how.epochs):
            told = []
            for part in torch.randperm(len(images)).split(how.batch):
                if len(part) < 2:  # a batch norm learns nothing from one
                    continue
                loss = local_loss(module, images[part], labels[part], how)
                if how.proximal:
                    far = zip(module.parameters(), anchors, strict=True)
                    loss = loss + how.proximal / 2 * sum((w - at).square().sum() for w, at in far)
                descent.zero_grad()
                loss.backward()
                descent.step()
                _lay(module, masks)
                told.append(float(loss.detach()))
        learned = settled(module.state_dict())
        found = _slopes(module, images, labels, how) if slopes else {}
    return Reply(learned, len(images), sum(told) / max(len(told), 1), found)


def _slopes(module: nn.Module, images: Tensor, labels: Tensor, how: Local) -> dict[str, Tensor]:
    """The gradient of each parameter on one batch."""
    part = torch.randperm(len(images))[: how.batch]
    names, parameters = zip(*module.named_parameters(), strict=True)
    if len(part) < 2:
        return {name: torch.zeros_like(one) for name, one in module.named_parameters()}
    loss = local_loss(module, images[part], labels[part], how)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def _lay(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, mask in masks.items():
            module.get_parameter(name).mul_(mask)


def local_loss(module: nn.Module, images: Tensor, labels: Tensor, how: Local) -> Tensor:
    """What a client lowers on some of its samples."""
    if how.learning == "supervised":
        return functional.cross_entropy(module(images), labels)
    views = torch.cat([changed(images), changed(images)])
    return simclr_loss(module(views), how.temperature)


def changed(images: Float[Tensor, "images channels height width"]) -> Tensor:
    """The same pictures, as a camera might have seen them: moved, lit and hidden at random.

    Each is moved by up to an eighth of its sides, multiplied by 0.6 to 1.4, given noise of 0.1,
    and a square of a quarter of its sides is taken out.
    """
    count, _, height, width = images.shape
    most = max(1, height // 8)
    padded = functional.pad(images, (most, most, most, most))
    rows = torch.randint(2 * most + 1, (count, 1)) + torch.arange(height)  # (images, height)
    columns = torch.randint(2 * most + 1, (count, 1)) + torch.arange(width)
    every = torch.arange(count)[:, None, None]
    moved = padded[every, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    lit = moved * (0.6 + 0.8 * torch.rand(count, 1, 1, 1)) + 0.1 * torch.randn(images.shape)
    tops, lefts = torch.randint(height, (count, 1)), torch.randint(width, (count, 1))
    down, across = torch.arange(height) - tops, torch.arange(width) - lefts
    hidden = ((down >= 0) & (down < height // 4))[:, :, None] & (
        (across >= 0) & (across < width // 4)
    )[:, None, :]  # (images, height, width)
    return lit.masked_fill(hidden[:, None], 0.0)


def simclr_loss(projected: Float[Tensor, "views width"], temperature: float) -> Tensor:
    """NT-Xent: each view is to be nearest to the other view of its picture.

        l_i = -log( exp(s_i,j / t) / sum over k != i of exp(s_i,k / t) ) ,  s = cosine

    Args:
        projected: The first views of all pictures, then the second ones in the same order.
        temperature: t.
    """
    count = len(projected) // 2
    near = functional.normalize(projected, dim=1)
    alike = (near @ near.T / temperature).fill_diagonal_(float("-inf"))  # (views, views)
    return functional.cross_entropy(alike, torch.arange(2 * count).roll(count))


def judged(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    shown: tuple[Tensor, Tensor],
    asked: tuple[Tensor, Tensor],
    learning: str,
) -> tuple[float, float | None]:
    """Accuracy and cross-entropy of a model on images and labels.

    A model that learned without labels is judged by a linear probe: ridge regression of the
    classes on its body's features.

    Args:
        module: The network.
        tensors: The model.
        shown: What a probe is fitted to.
        asked: What it is judged on.
        learning: How it learned.
    """
    module.load_state_dict(settled(tensors))
    module.eval()
    with torch.no_grad():
        if learning == "supervised":
            answers = module(asked[0])
            loss = float(functional.cross_entropy(answers, asked[1]))
            return _right(answers, asked[1]), loss
        body = module.get_submodule("body")
        return _right(_probe(body(shown[0]), shown[1], body(asked[0])), asked[1]), None


def _right(answers: Tensor, labels: Tensor) -> float:
    return float((answers.argmax(dim=1) == labels).double().mean())


def _probe(features: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    """Argmin over B of ||F B - Y||^2 + n / 100 ||B||^2 on standardised features, for others."""
    mean, spread = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)  # a dead feature
    left, right = (
        functional.pad((one - mean) / spread, (0, 1), value=1.0).double()
        for one in (features, asked)
    )
    gram = left.T @ left + len(left) / 100 * torch.eye(left.shape[1], dtype=torch.float64)
    return right @ torch.linalg.solve(gram, left.T @ functional.one_hot(labels).double())


def proxy_loss(
    module: nn.Module, tensors: Mapping[str, Tensor], images: Tensor, labels: Tensor
) -> Tensor:
    """Cross-entropy of a model on the server's own samples, to be derived by its tensors.

    Batch norms use the samples' own statistics, and none is updated.
    """
    module.train()
    apart = {name: tensor.detach().clone() for name, tensor in module.named_buffers()}
    answers = functional_call(module, {**tensors, **apart}, (images,))
    return functional.cross_entropy(answers, labels)


def pooled(stated: Sequence[Mapping[str, Tensor]], counts: Sequence[int]) -> dict[str, Tensor]:
    """Running means and variances of several clients as those of all their samples.

        mean = sum n_k mean_k / n ,   var = sum n_k (var_k + mean_k^2) / n - mean^2

    Args:
        stated: A model's tensors with each client's statistics.
        counts: Samples of each.
    """
    shares = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    made: dict[str, Tensor] = {}
    for name in stated[0]:
        if name.endswith("running_mean"):
            other = name.removesuffix("mean") + "var"
            means = torch.stack([one[name].double() for one in stated])  # (clients, channels)
            spreads = torch.stack([one[other].double() for one in stated])
            mean = shares @ means
            made[name] = mean.float()
            made[other] = (shares @ (spreads + means.square()) - mean.square()).float()
    return made


def restated(
    module: nn.Module, tensors: Mapping[str, Tensor], images: Tensor
) -> Mapping[str, Tensor]:
    """A model whose batch norms have the statistics of some samples; another is left as it is."""
    norms = [
        part
        for part in module.modules()
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
    ]
    if not norms:
        return tensors
    module.load_state_dict(settled(tensors))
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    module.train()
    with torch.no_grad():
        module(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return settled(module.state_dict())
