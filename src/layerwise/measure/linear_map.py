"""Depth efficiency: at which depth another model does what a block has done, by linear maps."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import measure
from layerwise.measure._tokens import column

# How far apart relative depths may lie and still be the same.
_NEAR = 0.2


def _across(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The share of blocks whose nearest block in the other model lies at the same depth."""
    depths, count = column(records, "depth"), len(records)
    apart = [abs(depth - place / count) for place, depth in enumerate(depths, 1)]
    return {"aligned": sum(one <= _NEAR + 1e-9 for one in apart) / count}


@measure(
    Paper("Do Language Models Use Their Depth Efficiently?", 2025, "2505.13898"),
    unit="block",
    across=_across,
)
def linear_map(
    outputs: Float[Tensor, "tokens width"],
    positions: Int64[Tensor, " tokens"],
    base_states: Sequence[Float[Tensor, "shown other"]],
    *,
    penalty: float = 1e-3,
) -> dict[str, float]:
    """Score a block by how well a linear map finds what another model makes of the same text.

    For each block j of the other model, of whatever depth and width, the map W, b of least squares
    from this block's answers h to the other's g_j,

        error_j = mean over tokens of ||W h + b - g_j|| / ||g_j||
        error   = min over j of error_j ,      depth = that j, from 1, as a share of its blocks

    Models that do the same with more blocks, only more slowly, have their nearest blocks at the
    same relative depth: across the model, `aligned` is the share of blocks with
    |depth - i / L| <= 0.2.

    Unlike the paper, which trains one map to all blocks by AdamW, each map is the one of least
    squares, with a ridge of `penalty` times the mean variance of h; the error is that on tokens it
    was not made of: every other token, and then the other way round.  A window's first token does
    not count.

    Args:
        outputs: What the block answers.
        positions: The place of each token in its window.
        base_states: What each block of the other model answers to the first of these tokens.
        penalty: Of the ridge.

    Returns:
        `error`, the score, 0 or more: higher is less alike, which counts as more important, as
        the other model has nothing like it; and `depth`.

    Raises:
        UserError: The penalty is not above 0, or there are too few tokens.
    """
    if not penalty > 0:
        raise UserError(f"a penalty of {penalty} is asked for.", "Give one above 0.")
    shown = len(base_states[0])
    later = positions[:shown] > 0
    if int(later.sum()) < 4:
        raise UserError(f"{shown} tokens make no map.", "Give a longer text.")
    ours = outputs[:shown][later].double()
    folds = [_fitted(ours[half::2], ours[1 - half :: 2], penalty) for half in (0, 1)]
    errors = [
        sum(_error(fitted, one[later].double(), half) for half, fitted in enumerate(folds)) / 2
        for one in base_states
    ]
    best = min(range(len(errors)), key=errors.__getitem__)
    return {"error": errors[best], "depth": (best + 1) / len(errors)}


def _fitted(
    known: Float64[Tensor, "known width"], asked: Float64[Tensor, "asked width"], penalty: float
) -> tuple[Tensor, Tensor]:
    """What brings targets at known tokens to predictions at others: all of the map but they."""
    middle = known.mean(dim=0)
    features, tried = known - middle, asked - middle
    level = float(features.square().mean()) or 1.0
    gram = features.T @ features
    gram.diagonal().add_(penalty * level * len(known))
    return tried, torch.linalg.solve(gram, features.T)


def _error(
    fitted: tuple[Tensor, Tensor], target: Float64[Tensor, "tokens other"], half: int
) -> float:
    """Of the predictions of what was not known."""
    tried, solved = fitted
    known, truth = target[half::2], target[1 - half :: 2]
    middle = known.mean(dim=0)
    guess = tried @ (solved @ (known - middle)) + middle
    size = truth.norm(dim=1)
    gap = (guess - truth).norm(dim=1)
    return float(torch.where(size > 0, gap / size.where(size > 0, 1.0), (gap > 0).double()).mean())
