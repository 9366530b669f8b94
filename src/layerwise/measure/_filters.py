"""The filters of a convolution: one small kernel for each pair of an output and an input."""

from jaxtyping import Bool, Float, Float64
from torch import Tensor

from layerwise.core.errors import UserError


def filters_of(weight: Float[Tensor, "out in"], entries: int) -> Float64[Tensor, "filters entries"]:
    """Every filter of a layer as a row; none where `entries` does not divide the layer's width.

    Raises:
        UserError: A filter would have no entries.
    """
    if entries < 1:
        raise UserError(
            f"filters of {entries} entries are asked for.",
            "Give the height times the width of the kernel, such as 9.",
        )
    if weight.shape[1] % entries:
        return weight.new_zeros(0, entries).double()
    return weight.double().reshape(-1, entries)


def sparse_of(
    filters: Float64[Tensor, "filters entries"], share: float, quantile: float = 1.0
) -> Bool[Tensor, " filters"]:
    """True where all entries are smaller than a share of a quantile of all entries' sizes.

    Raises:
        UserError: The share or the quantile is outside (0, 1].
    """
    if not 0 < share <= 1 or not 0 < quantile <= 1:
        raise UserError(
            f"a share of {share} of the quantile {quantile} is asked for.",
            "Give two numbers above 0 and at most 1.",
        )
    sizes = filters.abs()
    place = max(1, round(quantile * sizes.numel()))
    large = float(sizes.flatten().kthvalue(place).values) if sizes.numel() else 0.0
    # In a layer of zeros every filter is sparse.
    return (sizes < (share * large or 1.0)).all(dim=1)
