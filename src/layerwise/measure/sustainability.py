"""Layer sustainability: how far a small disturbance of the input moves a block's answer."""

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import measure


@measure(
    Paper(
        "Layer-wise Regularized Adversarial Training using Layers Sustainability Analysis (LSA) "
        "framework",
        2022,
        "2202.02626",
    ),
    unit="block",
)
def sustainability(
    outputs: Float[Tensor, "tokens width"],
    disturbed: Float[Tensor, "tokens width"],
    *,
    together: bool = False,
) -> float:
    """Score a block by how much its answer changes where the model's input was disturbed.

    With the answers phi(x) to the text and phi(x') to what it was made:

        CM = mean over tokens of ||phi(x) - phi(x')||_2 / ||phi(x)||_2

    The blocks above the mean over the model are the paper's most vulnerable layers.  Here x' are
    the embeddings with noise of a twentieth of their size, of signs that the gradient of the loss
    chooses (one step of FGSM), for tokens themselves cannot be moved a little.

    Unlike the official code, whose norms are those of a whole batch (`together`), each token
    counts alike.  The paper does not say what a token that answers nothing counts: 0 if it still
    does not, 1 if it does.

    Args:
        outputs: What the block answers.
        disturbed: What it answers to the disturbed text.
        together: Take the norms over all tokens at once.

    Returns:
        Relative change, 0 or more; higher is more vulnerable, which counts as more important.
    """
    before, after = outputs.double(), disturbed.double()
    if together:
        before, after = before.flatten()[None], after.flatten()[None]
    moved, size = (after - before).norm(dim=1), before.norm(dim=1)  # (tokens,)
    change = torch.where(size > 0, moved / size.where(size > 0, 1.0), (moved > 0).double())
    return float(change.mean()) if len(change) else 0.0
