"""In which phase of training networks are, from the landscape of their loss.

    from layerwise.training.phases import landscape, phases

    cells = {name: landscape(models, inputs, labels) for name, models in trained.items()}
    phases(cells)      # {"width 4": "I", "width 128": "IV-B", ...}

Yang et al. 2021 (arXiv:2107.11228), and the model zoo of 2025 (arXiv:2504.18072): networks of one
architecture, trained with several seeds, at several widths and temperatures (batch sizes, rates).
"""

import copy
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerwise.core.errors import UserError
from layerwise.core.results import Score, record
from layerwise.core.running.curve import Loss, Network, along, bent
from layerwise.measure._path import over_the_curve
from layerwise.measure.alignment import alignment
from layerwise.measure.hessian_trace import hessian_trace
from layerwise.measure.sharpness import sharpness

# A connectivity less than this share of the loss of a guess is none.
_NEAR = 0.05


@dataclass(frozen=True, slots=True)
class Landscape:
    """What networks of several seeds show: means over them, and over all pairs.

    Attributes:
        loss: Mean cross-entropy, in nats.
        sharpness: Top eigenvalue of the Hessian of the loss by all weights.
        trace: Of that Hessian.
        connectivity: (L(0) + L(1)) / 2 - L(t*) on a curve between two networks, in nats.
        similarity: Linear CKA of two networks' logits, 0 to 1.
        distance: Between two networks' weights.
        guess: What a guess loses, in nats: the logarithm of the number of classes.
    """

    loss: float
    sharpness: float
    trace: float
    connectivity: float
    similarity: float
    distance: float
    guess: float


def landscape(
    models: Sequence[nn.Module],
    inputs: Tensor,
    labels: Int64[Tensor, " examples"],
    *,
    batch: int = 128,
    epochs: int = 10,
    curved: int = 640,
    seed: int = 0,
) -> Landscape:
    """Look at networks that were trained alike, with several seeds.

    All is found on the examples given: those of training, in the papers, or held-out ones.  The
    curve is that of `mode_connectivity`; the Hessian is that of the first `curved` examples, by
    Lanczos's method and by Hutchinson's estimate from 100 directions.  Nothing of the models is
    changed; they run in evaluation mode.

    Args:
        models: Two or more networks of one architecture.
        inputs: What they are called with, (examples, ...).
        labels: Their classes.
        batch: Examples at once, and of a step of the curve's training.
        epochs: How often the curve's training sees each example.
        curved: Examples that the Hessian is of.
        seed: Of all that is drawn.

    Raises:
        UserError: There is one network, they differ in their tensors, or have batch norms, whose
            statistics are not known on a curve.
    """
    networks = [_network(model) for model in models]
    if len(networks) < 2 or any(_shapes(one) != _shapes(networks[0]) for one in networks):
        raise UserError(
            f"{len(networks)} networks of {len({str(_shapes(one)) for one in networks})} "
            "architectures were given.",
            "Give two or more of one architecture, trained with several seeds.",
        )
    if any(name.endswith("running_var") for name, _ in models[0].named_buffers()):
        raise UserError(
            f"{type(models[0]).__name__} has batch norms, whose statistics are not known on a "
            "curve between two networks.",
            "Give networks without them.",
        )
    model = copy.deepcopy(models[0]).eval()

    def loss(network: Network, part: Tensor) -> Tensor:
        answer = functional_call(model, dict(network), (inputs[part],))
        return functional.cross_entropy(answer.float(), labels[part])

    everything = torch.arange(len(labels))
    with torch.no_grad():
        logits = [
            torch.cat([functional_call(model, one, (part,)) for part in inputs.split(batch)])
            for one in networks
        ]
        losses = [float(functional.cross_entropy(one.float(), labels)) for one in logits]
    curves = [_Curvature(loss, one, everything[:curved]) for one in networks]
    pairs = list(itertools.combinations(range(len(networks)), 2))
    ways: list[float] = []
    for one, other in pairs:
        ends = networks[one], networks[other]
        middle = bent(loss, *ends, len(labels), batch=batch, epochs=epochs, seed=seed)
        curve = ends[0], middle, ends[1]
        ways.append(over_the_curve(along(loss, curve, len(labels), batch=batch)))
    alike = [-_score(alignment(logits[one], logits[other], centred=True)) for one, other in pairs]
    apart = [
        float((_flat(networks[one]) - _flat(networks[other])).double().norm())
        for one, other in pairs
    ]
    return Landscape(
        loss=statistics.fmean(losses),
        sharpness=statistics.fmean(
            _score(sharpness(one.at, one.product, seed=seed)) for one in curves
        ),
        trace=statistics.fmean(
            _score(hessian_trace(one.at, one.product, draws=100, seed=seed)) for one in curves
        ),
        connectivity=statistics.fmean(ways),
        similarity=statistics.fmean(alike),
        distance=statistics.fmean(apart),
        guess=math.log(logits[0].shape[1]),
    )


def _score(answer: Score) -> float:
    return record(answer)[""]


def phases(
    cells: Mapping[str, Landscape], *, small: float | None = None, alike: float | None = None
) -> dict[str, str]:
    """The phase of each of several kinds of networks.

        I     large loss, and a barrier                        underfitted, too small
        II    large loss, and no barrier                       underfitted
        III   small loss, and a barrier                        too small
        IV-A  small loss, well connected, answers differ       overfitted
        IV-B  small loss, well connected, answers alike        generalizes

    A connectivity below -5% of what a guess loses is a barrier.  The papers draw their lines by
    eye: here a loss is small below the geometric mean of the least and the largest of all cells,
    and answers are alike from the median CKA of the cells in phase IV on.  The papers' Hessian is
    large where the loss is, and decides nothing.

    Args:
        cells: What networks show, by a name for each kind.
        small: The loss below which it is small, instead.
        alike: The CKA from which on answers are alike, instead.

    Raises:
        UserError: There are no cells.
    """
    if not cells:
        raise UserError("no networks were given.", "Give the landscape of one kind or more.")
    losses = [max(one.loss, 1e-12) for one in cells.values()]
    line = math.sqrt(min(losses) * max(losses)) if small is None else small
    found: dict[str, str] = {}
    for name, one in cells.items():
        barrier = one.connectivity < -_NEAR * one.guess
        low = one.loss < line or (small is None and min(losses) == max(losses))
        found[name] = ("III" if barrier else "IV") if low else ("I" if barrier else "II")
    last = [cells[name].similarity for name, phase in found.items() if phase == "IV"]
    if not last:
        return found
    level = statistics.median(last) if alike is None else alike
    return {
        name: f"IV-{'B' if cells[name].similarity >= level else 'A'}" if phase == "IV" else phase
        for name, phase in found.items()
    }


class _Curvature:
    """The product of the Hessian of a loss, by all weights of a network, with a direction."""

    def __init__(self, loss: Loss, network: Network, part: Tensor) -> None:
        self.at = _flat(network)[None]  # (1, weights)
        self._loss = loss
        self._network = network
        self._part = part

    def product(self, direction: Tensor) -> Tensor:
        """H v, as d/dw <gradient, v> (Pearlmutter 1994)."""
        moving = {name: one.clone().requires_grad_() for name, one in self._network.items()}
        tensors = list(moving.values())
        # Fused attention has no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            slopes = torch.autograd.grad(self._loss(moving, self._part), tensors, create_graph=True)
            along = (torch.cat([one.flatten() for one in slopes]) * direction[0]).sum()
            turned = torch.autograd.grad(along, tensors, materialize_grads=True)
        return torch.cat([one.flatten() for one in turned])[None].detach()


def _network(model: nn.Module) -> dict[str, Tensor]:
    return {name: one.detach().float() for name, one in model.named_parameters()}


def _shapes(network: Network) -> dict[str, tuple[int, ...]]:
    return {name: tuple(one.shape) for name, one in network.items()}


def _flat(network: Network) -> Tensor:
    return torch.cat([one.flatten() for one in network.values()])
