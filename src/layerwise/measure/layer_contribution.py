"""Layer contribution: how far the answer moves when a block leaves some tokens as they are."""

import torch

from layerwise.core.catalogue import Paper
from layerwise.core.verbs import measure
from layerwise.measure._tokens import Answers, divergence, mean, pairs


@measure(
    Paper(
        "ShortV: Efficient Multimodal Large Language Models by Freezing Visual Tokens in "
        "Ineffective Layers",
        2025,
        "2504.00502",
    ),
    unit="block",
)
def layer_contribution(answers: Answers, frozen: Answers, *, last: bool = False) -> float:
    """Score a block by the KL of the answer when the block does nothing for a group of tokens.

    The block passes the tokens of the group on as it was given them.  Others still attend to
    their keys and values in it, which come from what it was given:

        LC = mean over places of KL(q || p) ,    p = the model's answer, q = the answer then

    Blocks with the least LC can leave the group alone while the model runs.

    In the paper the group is a picture's tokens and the place is where the answer to a prompt
    begins.  Here it is the first half of a window, less its first token, and unlike the paper all
    places of the second half count, each the end of a text of its own: one place of few windows
    would tell little.  `last` takes the last place of each window alone, as the paper does.  The
    KL is from the changed answer to the model's, as in the authors' code.  The last block's LC is
    0, because nothing later reads the group.

    For B blocks it takes B^2 / 2 passes of 16 windows through a block.

    Args:
        answers: Log-probabilities of what the model answers.
        frozen: Of what it answers without the block for the first half, less its first token.
        last: Only the last place of each window counts.

    Returns:
        LC in nats; higher is more important.
    """
    found = [divergence(changed, known) for known, changed in pairs(answers, frozen)]
    every = torch.cat(found)  # (windows, length)
    start = every.shape[1] - 1 if last else every.shape[1] // 2
    return mean(every[:, start:].flatten())
