"""Task arithmetic: add what each fine-tuning added."""

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import merger
from layerwise.merge._differences import added, share_of_all


@merger(
    Paper("Editing Models with Task Arithmetic", 2022, "2212.04089"),
    rows="entry",
)
def task_arithmetic(
    models: Float[Tensor, "models ..."],
    base: Float[Tensor, "..."],
    shares: Float[Tensor, " models"],
    *,
    scale: float = 0.3,
    normalize: bool = False,
) -> Float[Tensor, "..."]:
    """Add the models' differences from their common base to it.

        W = W_0 + scale sum_k s_k (W_k - W_0)

    A negative share takes a task away.

    Args:
        models: The same tensor of every fine-tuned model.
        base: That of the model they were tuned from.
        shares: How much each model counts.
        scale: Times all differences together; 0.3 to 0.4 where nothing is known.
        normalize: Take shares as fractions of their sum.

    Raises:
        UserError: The shares add up to nothing, and are to be fractions of that.
    """
    return added(models, base, share_of_all(shares, normalize)).mul_(scale).add_(base)
