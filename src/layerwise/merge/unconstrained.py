"""Unconstrained merging: a coefficient for every model and layer, found by evolution."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import merger
from layerwise.merge._states import Made, layers_of

# Scales that are tried for all layers alike; the best is where the search begins.
_GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
_MOST = 1.5
_SHRINK = 0.96  # of the step, each generation
_PARENTS, _CHILDREN = 4, 10

State = Mapping[str, Tensor]


@merger(
    Paper("Unconstrained Model Merging for Enhanced LLM Reasoning", 2024, "2410.13699"),
    claims=(
        Claim("one", "digits-experts-searched/merge", {}, 0.029,
              "card 034: one point (of 34, with a weak base) above the best scale for all layers"),
    ),
    exempt={
        "ignores_the_order_of_models": "what is drawn is drawn for a model's place; a merge of "
        "files puts models in an order of their own first"
    },
)  # fmt: skip
def unconstrained(
    networks: Sequence[State],
    origin: State,
    loss: Callable[[State], float],
    *,
    generations: int = 25,
    step: float = 0.15,
    seed: int = 0,
) -> State:
    """Search a coefficient for each model's difference from the base in each layer.

        W_l = W_0l + sum_k c_kl (W_kl - W_0l),   c_kl in [0, 1.5]

    The search begins at the best of seven values that are the same everywhere, and goes on by
    evolution: of each generation of 10, drawn around the mean of the best 4 of the one before with
    a standard deviation that shrinks by 4% each time, the best 4 are kept.  What is never better
    than the beginning is not taken.  A layer is a block of the model, or a module outside.

    Unlike the paper, of which we know that it searches with CMA-ES, the covariance of the draws is
    not adapted, and differences are not made sparse.  A second half of the paper, which distills
    models of other architectures into one, is no merge of weights.

    Args:
        networks: Tensors of every fine-tuned model by name.
        origin: Those of the model they were tuned from.
        loss: What a model loses on a small text.
        generations: How often children are drawn; 10 trials each.
        step: Standard deviation at first.
        seed: Draws other children.

    Raises:
        UserError: There is nothing to search with.
    """
    if generations < 0 or step <= 0:
        raise UserError(
            f"{generations} generations with a step of {step} search nothing.",
            "Give 0 or more generations, and a step above 0.",
        )
    layers = layers_of(origin)
    shape = (len(networks), len(layers))

    def made(coefficients: Float64[Tensor, "models layers"]) -> State:
        return _merged(networks, origin, layers, coefficients)

    uniform = [torch.full(shape, scale, dtype=torch.float64) for scale in _GRID]
    tried = [(loss(made(one)), n) for n, one in enumerate(uniform)]
    best, place = min(tried)
    found = mean = uniform[place]
    generator = torch.Generator().manual_seed(seed)
    for generation in range(generations):
        noise = torch.randn(_CHILDREN, *shape, generator=generator, dtype=torch.float64)
        children = (mean + step * _SHRINK**generation * noise).clamp(0.0, _MOST)
        losses = [loss(made(child)) for child in children]
        order = sorted(range(_CHILDREN), key=losses.__getitem__)
        mean = children[order[:_PARENTS]].mean(dim=0)
        if losses[order[0]] < best:
            best, found = losses[order[0]], children[order[0]]
    return made(found)


def _merged(
    networks: Sequence[State],
    origin: State,
    layers: Mapping[str, Sequence[str]],
    coefficients: Float64[Tensor, "models layers"],
) -> State:
    place = {name: n for n, names in enumerate(layers.values()) for name in names}

    def merged(name: str) -> Tensor:
        total = torch.zeros_like(origin[name])
        for state, coefficient in zip(networks, coefficients[:, place[name]].tolist(), strict=True):
            total += (state[name] - origin[name]).mul_(coefficient)
        return total.add_(origin[name])

    return Made(list(origin), merged)
