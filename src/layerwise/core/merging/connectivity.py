"""How two networks lie to each other: the distance, the way between them, and their directions."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from layerwise.core.errors import UserError

State = Mapping[str, Tensor]


def distance(first: State, second: State) -> float:
    """The length of the difference of all tensors of floats together."""
    squares = [
        float((one.double() - second[name].double()).square().sum())
        for name, one in first.items()
        if one.is_floating_point()
    ]
    return sum(squares) ** 0.5


def rise(losses: Sequence[float]) -> float:
    """The most that a straight way loses beyond the line between its ends.

        barrier = max over t of L((1 - t) A + t B) - ((1 - t) L(A) + t L(B))

    Args:
        losses: At evenly spaced points, both ends included; 0.0 where no point is above the line.

    Raises:
        UserError: There are no two ends.
    """
    if len(losses) < 2:
        raise UserError(f"a way of {len(losses)} points has no ends.", "Give two or more.")
    last = len(losses) - 1
    line = [losses[0] + n / last * (losses[-1] - losses[0]) for n in range(last + 1)]
    return max(loss - at for loss, at in zip(losses, line, strict=True))


def alignment(first: State, second: State, gamma: float = 0.0) -> float:
    """How much alike the directions of two networks are, weighed by their singular values.

    With W_a = sum_i s_i u_i v_i^T and W_b = sum_j t_j p_j q_j^T for each layer l, filters as rows,
    and of these the terms with s_i >= gamma s_1 and t_j >= gamma t_1,

        R_gamma = sum_l sum_ij s_i t_j (u_i . p_j) (v_i . q_j) / sum_l sum_i s_i t_i

    1 where the layers are alike but for a factor, near 0 for networks of other seeds.  A
    permutation changes the numerator alone, for singular values stay; at gamma = 0 that is
    sum_l <W_a, W_b>, so that

        |a - b|^2 = sum_l (sum_i s_i^2 + sum_i t_i^2) - 2 numerator

    Unlike the paper, which need not say it, the sum over i in the denominator ends where either
    layer has no more terms.

    Args:
        first: Tensors by name; what has two axes or more is a layer.
        second: Those of the other network.
        gamma: Which directions count, as a fraction of the largest singular value.

    Raises:
        UserError: The fraction is none, or there is no layer.
    """
    if not 0 <= gamma <= 1:
        raise UserError(f"a fraction of {gamma} is not possible.", "Give 0 to 1.")
    alike = most = 0.0
    for name, one in first.items():
        if one.is_floating_point() and one.dim() > 1:
            kept, values = _largest(one, gamma)
            other, others = _largest(second[name], gamma)
            alike += float((kept * other).sum())
            count = min(len(values), len(others))
            most += float((values[:count] * others[:count]).sum())
    if not most:
        raise UserError("there is no layer to compare.", "Give networks with matrices.")
    return alike / most


def _largest(
    weight: Tensor, gamma: float
) -> tuple[Float64[Tensor, "out in"], Float64[Tensor, " _"]]:
    """A layer without its small singular values, and those that are left."""
    left, values, right = torch.linalg.svd(weight.double().flatten(1), full_matrices=False)
    kept = values >= gamma * values[:1]
    return (left[:, kept] * values[kept]) @ right[kept], values[kept]
