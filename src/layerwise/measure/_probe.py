"""Linear probes: what a straight line through a block's states tells of a text's class."""

from dataclasses import dataclass
from typing import Any, cast

import numpy
import torch
from jaxtyping import Float, Float64, Int64
from scipy import optimize
from torch import Tensor

# A feature that varies less than this beside its size does so by rounding.
_NO_SPREAD = 1e-9


@dataclass(frozen=True, slots=True)
class Probe:
    """A multinomial logistic regression on features at mean 0 and deviation 1.

    Attributes:
        centre: Mean of each feature of what it learned from, (width,).
        spread: Deviation of each; infinite where there was none.
        weight: (width, classes).
        bias: (classes,).
    """

    centre: Float64[Tensor, " width"]
    spread: Float64[Tensor, " width"]
    weight: Float64[Tensor, "width classes"]
    bias: Float64[Tensor, " classes"]

    def answers(self, states: Float[Tensor, "examples width"]) -> Float64[Tensor, "examples _"]:
        """Log-probabilities of the classes, (examples, classes)."""
        features = (states.double() - self.centre) / self.spread
        return (features @ self.weight + self.bias).log_softmax(dim=-1)


def probe(
    states: Float[Tensor, "examples width"],
    labels: Int64[Tensor, " examples"],
    classes: int,
    *,
    penalty: float = 1.0,
    bias_penalty: float = 0.0,
) -> Probe:
    """Fit a probe by L-BFGS.

        min over W, b of - sum_n log softmax(W^T x_n + b)[y_n] + penalty / 2 ||W||^2

    with x the features at mean 0 and deviation 1, as the examples given have them.  For two
    classes the penalty counts twice, which makes it the logistic regression of one weight per
    feature.  A W of least norm lies in the span of the examples, so that of more features than
    examples their principal directions are fitted, with the same result.

    Args:
        states: What to learn from.
        labels: Their classes.
        classes: How many classes there are, whether or not all are among the labels.
        penalty: How much the size of the weights costs; 1 is scikit-learn's C=1.
        bias_penalty: How much that of the bias costs: above 0, a class without an example stays
            possible.
    """
    given = states.double()
    centre, spread = given.mean(dim=0), given.std(dim=0, correction=0)
    size = given.abs().amax(dim=0)
    spread = torch.where(spread > _NO_SPREAD * size, spread, torch.inf)
    features = (given - centre) / spread
    basis = None
    if features.shape[1] > len(features):
        left, values, basis = torch.linalg.svd(features, full_matrices=False)
        features = left * values
    twice = 2 if classes == 2 else 1
    inputs = numpy.concatenate([features.numpy(), numpy.ones((len(features), 1))], axis=1)
    truth = numpy.eye(classes)[labels.numpy()]
    costly = numpy.full((inputs.shape[1], 1), twice * penalty)
    costly[-1] = twice * bias_penalty

    def loss(flat: Any) -> tuple[float, Any]:
        weight = flat.reshape(-1, classes)
        logits = inputs @ weight
        logits -= logits.max(axis=1, keepdims=True)
        chances = numpy.exp(logits)
        sums = chances.sum(axis=1, keepdims=True)
        likelihood = (logits * truth).sum() - numpy.log(sums).sum()
        gradient = inputs.T @ (chances / sums - truth) + costly * weight
        return float((costly * weight**2).sum() / 2 - likelihood), gradient.ravel()

    start = numpy.zeros(inputs.shape[1] * classes)
    options = {"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-6}
    found = cast("Any", optimize.minimize)(
        loss, start, jac=True, method="L-BFGS-B", options=options
    )
    fitted = torch.from_numpy(found.x.reshape(-1, classes))
    weight = fitted[:-1] if basis is None else basis.T @ fitted[:-1]
    return Probe(centre, spread, weight, fitted[-1])
