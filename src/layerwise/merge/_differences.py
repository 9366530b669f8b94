"""What fine-tuning changed, put together: steps that merges of task vectors share.

Every step is one rounded operation per entry, in the order of the models: products that are added
without being rounded first would depend on where a slice ends.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from layerwise.core.errors import UserError


def added(
    models: Float[Tensor, "models ..."],
    base: Float[Tensor, "..."],
    shares: Float[Tensor, " models"],
) -> Float[Tensor, "..."]:
    """The differences of the models from their base, each times its share, added up."""
    total = base.new_zeros(base.shape)
    for model, share in zip(models, shares.tolist(), strict=True):
        if share:
            total += (model - base).mul_(share)
    return total


def elected(
    differences: Sequence[Float[Tensor, "..."]], shares: Float[Tensor, " models"], normalize: bool
) -> Float[Tensor, "..."]:
    """Of each entry's differences those with the sign of their sum, added up or averaged.

    With s_k the shares and d_k the differences,

        sign = sign(sum_k s_k d_k), positive where the sum is 0
        sum of s_k d_k over k with sign(s_k d_k) = sign, [/ sum of those s_k]

    Args:
        differences: What is left of each model's difference, where 0.0 agrees with no sign; they
            are used up.
        shares: How much each model counts.
        normalize: Divide by the shares of those that agreed.
    """
    weighed = [
        one if share == 1 else one.mul_(share)
        for one, share in zip(differences, shares.tolist(), strict=True)
    ]
    total = weighed[0].clone()
    for one in weighed[1:]:
        total += one
    sign = total.ge(0.0).to(total.dtype).mul_(2.0).sub_(1.0)
    total.zero_()
    counted = total.clone()
    for one, share in zip(weighed, shares.tolist(), strict=True):
        agreed = one.mul_(sign).clamp_(min=0.0)
        total += agreed
        counted += agreed.sign_() if share == 1 else agreed.sign_().mul_(share)
    if normalize:
        total /= counted.add_(counted.eq(0.0))
    return total.mul_(sign)


def share_of_all(shares: Float[Tensor, " models"], normalize: bool) -> Float[Tensor, " models"]:
    """The shares as fractions of their sum, if they are to be.

    Raises:
        UserError: They add up to nothing.
    """
    if not normalize:
        return shares
    total = float(shares.double().sum())
    if abs(total) < 1e-8:
        raise UserError(
            f"the weights {shares.tolist()} add up to {total:.3g}, so they are no fractions of it.",
            "Give other weights, or leave them as they are with normalize: false.",
        )
    return (shares.double() / total).to(shares.dtype)


def densities(density: float | Sequence[float], models: int) -> list[float]:
    """The fraction of each model's differences that is kept.

    Raises:
        UserError: One is no fraction, or there is not one for each model.
    """
    listed = list(density) if isinstance(density, Sequence) else [density] * models
    if len(listed) != models or not all(0 <= one <= 1 for one in listed):
        raise UserError(
            f"density {density} is not possible for {models} models.",
            "Give one from 0 to 1, or one for each model.",
        )
    return [float(one) for one in listed]
