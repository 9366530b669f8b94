"""Displacement: how far training moved a layer's weights, for their size."""

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import measure
from layerwise.measure._relative import relative


@measure(
    Paper(
        "How connectivity structure shapes rich and lazy learning in neural circuits",
        2024,
        "2310.08513",
    )
)
def displacement(weight: Float[Tensor, "out in"], base: Float[Tensor, "out in"]) -> float:
    """Score a layer by the length of its way from where it started.

    One of the paper's marks of rich learning, which moves weights far; lazy learning hardly does:

        ||W - W_0||_F / ||W_0||_F

    Unlike the paper, which compares runs of one initial norm, it is relative to that norm.  Nor
    does the paper say that a layer which moved further is more important: here it is, as more of
    what it does was learned since.  A layer that starts at zero counts as 1 once it moved.

    Args:
        weight: The layer.
        base: The same layer at its start.

    Returns:
        Relative distance, 0 or more; higher is more important.
    """
    before = base.double()
    moved = float((weight.double() - before).norm())
    return relative(moved, float(before.norm()))
