"""LwPTV: layers of a task vector that carry nothing of their own are left out before merging."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import merger
from layerwise.merge._states import Made, layers_of


@merger(
    Paper("Merging Smarter, Generalizing Better: Enhancing Model Merging on OOD Data", 2025,
          "2506.09093"),
    claims=(
        Claim("task_arithmetic", "digits-experts-unseen/merge", {"scale": 0.5}, 0.05, "abstract"),),
)  # fmt: skip
def lwptv(
    networks: Sequence[Mapping[str, Tensor]],
    origin: Mapping[str, Tensor],
    *,
    pruned: float = 0.5,
    scale: float = 0.3,
    saliency: Literal["deviation", "relative", "magnitude"] = "deviation",
) -> Mapping[str, Tensor]:
    """Add the models' differences from their base, without each model's least salient layers.

    With d_k = W_k - W_0 for each layer l, its matrices taken together,

        S_kl = mean of (d_kl - mean_j d_jl)^2           (deviation)
             = |d_kl| / |W_0l|                          (relative)
             = mean of |d_kl|                           (magnitude)
        m_kl = 0 for the round(pruned L) layers of model k with the lowest S_kl, else 1
        W_l  = W_0l + scale sum_k m_kl d_kl

    A layer is a module, or the modules of a name up to its last number: a block.  Vectors share the
    mask of their layer, and are not scored.  Of equally salient layers the earlier one is left out.
    The paper's own formula was not at hand: its abstract speaks of a saliency score for each layer
    and a mask; deviation is what such a score is most likely to be.  A single model deviates from
    nothing, and is scored by "relative".

    Args:
        networks: Tensors of every fine-tuned model by name.
        origin: Those of the model they were tuned from.
        pruned: Fraction of each model's layers that is left out.
        scale: Times all differences together.
        saliency: What is thought to make a layer count.

    Raises:
        UserError: The fraction is none.
    """
    if not 0 <= pruned <= 1:
        raise UserError(f"a fraction of {pruned} layers cannot be left out.", "Give 0 to 1.")
    layers = layers_of(origin)
    kept = _kept(_scores(networks, origin, layers, saliency), pruned)
    place = {name: n for n, names in enumerate(layers.values()) for name in names}

    def merged(name: str) -> Tensor:
        total = torch.zeros_like(origin[name])
        for model, state in enumerate(networks):
            if bool(kept[model, place[name]]):
                total += state[name] - origin[name]
        return total.mul_(scale).add_(origin[name])

    return Made(list(origin), merged)


def _scores(
    networks: Sequence[Mapping[str, Tensor]],
    origin: Mapping[str, Tensor],
    layers: Mapping[str, Sequence[str]],
    saliency: str,
) -> Float64[Tensor, "models layers"]:
    if saliency == "deviation" and len(networks) == 1:
        saliency = "relative"
    scores = torch.zeros(len(networks), len(layers), dtype=torch.float64)
    for column, names in enumerate(layers.values()):
        count, size = 0, 0.0
        for name in _matrices(names, origin):
            base = origin[name].double()
            differences = [state[name].double() - base for state in networks]
            middle = torch.stack(differences).mean(dim=0) if saliency == "deviation" else 0.0
            count += base.numel()
            size += float(base.square().sum())
            for row, one in enumerate(differences):
                apart = (one - middle).abs()
                part = apart.sum() if saliency == "magnitude" else apart.square().sum()
                scores[row, column] += float(part)
        if saliency == "relative":
            scores[:, column] = (scores[:, column] / size).sqrt() if size else 0.0
        else:
            scores[:, column] /= max(count, 1)
    return scores


def _matrices(names: Sequence[str], origin: Mapping[str, Tensor]) -> Iterator[str]:
    """The tensors of a layer that it is scored by: all of them where it has vectors alone."""
    matrices = [name for name in names if origin[name].dim() > 1]
    yield from matrices or names


def _kept(scores: Float64[Tensor, "models layers"], pruned: float) -> Bool[Tensor, "models layers"]:
    kept = torch.ones(scores.shape, dtype=torch.bool)
    leaving = round(pruned * scores.shape[1])
    order = scores.sort(dim=1, stable=True).indices
    return kept.scatter_(1, order[:, :leaving], False)
