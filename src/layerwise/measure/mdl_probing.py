"""MDL probing: how short a message tells the classes of texts to who knows a block's states."""

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.errors import UserError
from layerwise.core.reading.labelled import check_labels
from layerwise.core.verbs import measure
from layerwise.measure._probe import probe
from layerwise.measure._tokens import centre, column

# Of all examples, what the first blocks of the message end at.
_FRACTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)


def _across(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The block that tells most, and where what is told lies: the least counts as nothing."""
    found = column(records, "compression")
    least = min(found)
    best = float(max(range(len(found)), key=found.__getitem__))
    return {"best": best, "centre": centre([value - least for value in found])}


@measure(
    Paper(
        "Not All Models Localize Linguistic Knowledge in the Same Place: A Layer-wise Probing on "
        "BERToids' Representations",
        2021,
        "2109.05958",
    ),
    unit="block",
    across=_across,
)
def mdl_probing(
    states: Float[Tensor, "examples width"],
    labels: Int64[Tensor, " examples"],
    *,
    shuffles: int = 3,
    penalty: float = 1.0,
) -> dict[str, float]:
    """Score a block by how far its states shorten a message of the labels.

    The accuracy of a probe hides how much it had to be told.  The online code (Voita and Titov,
    2020, arXiv:2003.12298) counts that too: labels are sent block after block, each coded with a
    probe trained on all that were sent before, the first by a uniform code:

        L = t_1 log2 C + sum_i - log2 p_i(y_n | states),  n from t_i to t_(i+1)
        compression = N log2 C / L

    with C classes, N examples, and t at 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.25, 12.5, 25, 50 and 100%
    of them.  Above 1 the states tell something.  Lengths are in bits throughout; the authors'
    notebook seems to add nats to bits.

    Unlike the paper's, which are small networks stopped early on other examples, the probes are
    logistic regressions with L2 on weights and bias, on features at mean 0 and deviation 1 of what
    was sent before: a class that was not sent yet stays possible, and no learning rate decides
    between blocks.  The penalty is `penalty` times the width, so that before anything is learned
    a logit is taken to be about as likely as one of variance 1 / penalty, whatever the width; with
    a fixed one, wide states make probes that are sure of themselves after few examples.  The mean
    length over `shuffles` orders is taken, the same for all blocks.

    Across the model, `best` is the place of the block with the highest compression, from 0, and
    `centre` the mean place weighed by the compression beyond the lowest one; the paper shows the
    curve and marks the best.

    Args:
        states: What the block answers at the last token of each text.
        labels: The class of each, from 0.
        shuffles: Orders in which examples are sent.
        penalty: How much the size of a probe's weights costs, for each feature.

    Returns:
        `compression`, the score, higher is more; `bits`, L; `accuracy` of the last probe on what
        it coded; and `control`, the compression of the same labels dealt out at random: what is
        not well above it is not in the states.

    Raises:
        UserError: There is one class, there are few examples, or no order.
    """
    check_labels(labels)
    if shuffles < 1 or not penalty > 0:
        raise UserError(
            f"{shuffles} orders and a penalty of {penalty} are asked for.",
            "Give one order or more, and a penalty above 0.",
        )
    count, classes = len(labels), int(labels.max()) + 1
    found: list[tuple[float, float]] = []
    for seed in range(shuffles):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        found.append(_sent(states[order], labels[order], classes, penalty))
    bits, accuracy = (sum(part) / shuffles for part in zip(*found, strict=True))
    # The same classes, as often, of texts that have nothing to do with them.
    strange = labels[torch.randperm(count, generator=torch.Generator().manual_seed(shuffles))]
    guessed, _ = _sent(states, strange, classes, penalty)
    uniform = count * math.log2(classes)
    return {
        "compression": uniform / bits,
        "bits": bits,
        "accuracy": accuracy,
        "control": uniform / guessed,
    }


def _sent(
    states: Float[Tensor, "examples width"],
    labels: Int64[Tensor, " examples"],
    classes: int,
    penalty: float,
) -> tuple[float, float]:
    """The length of the message in bits, and how often the last probe was right."""
    strength = penalty * states.shape[1]
    ends = sorted({int(fraction * len(labels)) for fraction in _FRACTIONS} - {0})
    length, accuracy = ends[0] * math.log2(classes), 0.0
    for start, end in itertools.pairwise(ends):
        known = states[:start], labels[:start]
        fitted = probe(*known, classes, penalty=strength, bias_penalty=penalty)
        answers = fitted.answers(states[start:end])
        truth = labels[start:end]
        length -= float(answers.gather(1, truth[:, None]).sum()) / math.log(2)
        accuracy = float((answers.argmax(dim=1) == truth).double().mean())
    return length, accuracy
