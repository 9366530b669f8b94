"""Batch norms of a network that was put together from others: their statistics taken anew."""

from collections.abc import Mapping

from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.reading.checkpoint import Source
from layerwise.core.reading.structure import structure
from layerwise.core.running.runner import Runner
from layerwise.core.running.tuning import batch_norms, norm_statistics


def batch_statistics(
    source: Source, tensors: Mapping[str, Tensor], inputs: Tensor
) -> dict[str, Tensor]:
    """Mean and variance of what each batch norm of a network sees.

    Averaged units of two networks vary less than either's, as far as they do not agree; the means
    of the two networks' statistics then leave every layer with too weak a signal, and the deeper
    the weaker.  All norms go by the statistics of the batch meanwhile, so that one pass serves all.

    Args:
        source: A network of that architecture.
        tensors: Those of the network in question, by name.
        inputs: What it is called with.

    Returns:
        The norms' tensors by name.

    Raises:
        UserError: It has no batch norm, or cannot be run as a whole.
    """
    runner = Runner(source, structure(source))
    if not runner.whole:
        raise UserError(
            f"{source.label} is run block by block; batch norms are estimated again of modules "
            "that run as a whole.",
            "Leave norms out.",
        )
    if not batch_norms(runner, ""):
        raise UserError(f"{source.label} has no batch norm.", "Leave norms out.")
    return norm_statistics(runner, "", runner.start(inputs), dict(tensors), {})
