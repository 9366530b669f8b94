"""What changes of layers do to a model together, to second order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerwise.core.errors import UserError
from layerwise.core.progress import Progress
from layerwise.core.reading.structure import Layer
from layerwise.core.running.products import Answer
from layerwise.core.running.runner import Runner


@dataclass(frozen=True, slots=True)
class Change:
    """A layer, and what is added to it.

    Attributes:
        layer: The layer.
        weight: Its matrix as it is.
        delta: What is added to it.
    """

    layer: Layer
    weight: Float[Tensor, "out in"]
    delta: Float[Tensor, "out in"]

    def partly(self, made: Float[Tensor, ""]) -> Answer:
        """What the layer answers with a fraction of the change made.

        The two products are apart, so that no gradient has the size of a weight.
        """

        def answer(inputs: Tensor) -> Tensor:
            weight, delta = (part.to(inputs.device) for part in (self.weight, self.delta))
            brought = nn.functional.linear(inputs, delta)
            return nn.functional.linear(inputs, weight) + made.to(inputs.device) * brought

        return answer


def divergence_shares(
    runner: Runner, changes: Sequence[Change], ids: Tensor, progress: Progress
) -> Float64[Tensor, " changes"]:
    """What each change brings to the KL of the model's answer when all are made; see `shares`.

    In nats per predicted token.  The loss is the KL from the model's own answer: its gradient is
    zero where nothing is changed, so that no linear term is left out.

    The whole model is in memory, and the graph of one window with its second derivatives.

    Args:
        runner: Runs the model.
        changes: What is made of layers; one at most for each.
        ids: Token ids, (windows, length), or whatever the model takes a batch of.
        progress: Is told of each window.

    Raises:
        UserError: A layer was not seen to multiply anything.
    """
    answer = runner.differentiable("")
    total = torch.zeros(len(changes), dtype=torch.float64)
    seen: set[str] = set()
    predicted = 0
    for number, window in enumerate(ids.split(1)):
        loss = Divergence(answer, changes, window)
        # Where no layer multiplied anything (experts without tokens) nothing can be told apart.
        if loss.seen:
            total += shares(loss, len(changes)).cpu()
        predicted += loss.predicted
        seen |= loss.seen
        progress.step(f"window {number}")
    for change in changes:
        if change.layer.name not in seen and "expert" not in change.layer.name:
            raise UserError(
                f"{change.layer.name} was not seen to multiply anything, so what changing it does "
                "is not known.",
                "Take --sensitivity error.",
            )
    return total / predicted


def shares(loss: Callable[[Tensor], Tensor], count: int) -> Float64[Tensor, " count"]:
    """What each of some changes brings to a loss when all are made together, to second order.

    With x_l the fraction of a change delta_l that is made, H the Hessian of the loss by weights:

        M_lm = delta_l^T H_lm delta_m = d^2 loss / dx_l dx_m          at x = 0
        s_l  = 1/2 M_ll + 1/2 sum_{m != l} M_lm = 1/2 d/dx_l sum_m dloss/dx_m

    so the shares add up to 1/2 sum_lm M_lm, what all of them bring together.  They are the rows
    of M summed up, for which one backward pass through the gradient is enough.  A share is below
    zero where a change undoes more of the others than it brings by itself.

    Source: Schaefer et al., "Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision
    Post-Training Quantization", 2023 (arXiv:2306.04879), of whose estimator only the abstract was
    to be had: this is the second order itself.

    Args:
        loss: Loss at fractions, (count,), of the changes.
        count: How many changes there are.
    """
    made = torch.zeros(count, requires_grad=True)
    # Fused attention has no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        (slopes,) = torch.autograd.grad(loss(made), made, create_graph=True)
        (rows,) = torch.autograd.grad(slopes.sum(), made)
    return rows.double() / 2


def divergence(before: Float[Tensor, "..."], after: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """KL from some logits to others, (..., vocabulary), summed over all that is before."""
    p, q = (logits.float().log_softmax(dim=-1) for logits in (before, after))
    return nn.functional.kl_div(q, p, reduction="sum", log_target=True)


class Divergence:
    """KL from a model's answer to one window, to that with fractions of changes made.

    Summed over predicted tokens, as a function of those fractions, (changes,).

    Args:
        answer: What the model answers to a window, where layers answer in their own way.
        changes: What is made of layers.
        window: The window, as a batch of one.

    Attributes:
        seen: Names of the layers that multiplied something.
        predicted: Tokens that are predicted.
    """

    def __init__(
        self,
        answer: Callable[[Tensor, Mapping[str, Answer]], Tensor],
        changes: Sequence[Change],
        window: Tensor,
    ) -> None:
        self.seen: set[str] = set()
        self._answer = answer
        self._changes = changes
        self._window = window
        with torch.no_grad():
            self._before = self._answered(torch.zeros(len(changes)))
        self.predicted = self._before.numel() // self._before.shape[-1]

    def __call__(self, made: Tensor) -> Tensor:
        """The KL with these fractions made."""
        return divergence(self._before, self._answered(made))

    def _answered(self, made: Tensor) -> Tensor:
        parts = zip(self._changes, made, strict=True)
        answers = {
            change.layer.name: self._watched(change.layer.name, change.partly(part))
            for change, part in parts
        }
        logits = self._answer(self._window, answers)
        # The last position of a window predicts a token outside of it.
        return logits[:, :-1] if logits.dim() > 2 else logits

    def _watched(self, name: str, answer: Answer) -> Answer:
        def watched(inputs: Tensor) -> Tensor:
            self.seen.add(name)
            return answer(inputs)

        return watched
