"""Move a layer's input scales into whatever feeds it, leaving the model's function as it was."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor


def fold(
    feeder: str,
    tensors: Mapping[str, Tensor],
    scale: Float[Tensor, " in"],
    *,
    norm_offset: float,
) -> dict[str, Tensor]:
    """Divide a norm's or a layer's output by `scale`, entry by entry.

    Args:
        feeder: Name of the module.
        tensors: Its `weight`, and its `bias` if it has one, by full name; float32.
        scale: One divisor per output.
        norm_offset: What a norm adds to its stored weight before it multiplies by it.

    Returns:
        The new tensors, by the same names.
    """
    folded: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == f"{feeder}.weight" and tensor.dim() == 1:
            folded[name] = (tensor + norm_offset) / scale - norm_offset
        else:
            folded[name] = tensor / scale.reshape(-1, *[1] * (tensor.dim() - 1))
    return folded
