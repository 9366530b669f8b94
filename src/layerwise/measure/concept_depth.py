"""Concept depth: at which block a straight line tells the classes of texts apart."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Float64, Int64
from scipy import stats
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.errors import UserError
from layerwise.core.reading.labelled import check_labels
from layerwise.core.verbs import measure
from layerwise.measure._probe import probe
from layerwise.measure._tokens import column

# The relative gain of accuracy that is a jump, the change below which it has converged, and the
# share of the best that counts as reached.
_JUMP, _CONVERGED, _REACHED = 1.1, 0.03, 0.95


def _across(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Where the accuracy jumps, where it stays, and where it has nearly reached its best."""
    accuracy, blocks = column(records, "accuracy"), len(records)
    gains = [after / max(before, 1e-6) for before, after in itertools.pairwise(accuracy)]
    jumps = [place for place, gain in enumerate(gains, 1) if gain >= _JUMP]
    moves = [place for place, gain in enumerate(gains, 1) if abs(gain - 1) >= _CONVERGED]
    best = _REACHED * max(accuracy)
    return {
        "jump": max(jumps, default=0) / blocks,
        "converged": (max(moves, default=0) + 1) / blocks,
        "reached": next(place for place, found in enumerate(accuracy) if found >= best) / blocks,
    }


@measure(
    Paper(
        "Exploring Concept Depth: How Large Language Models Acquire Knowledge at Different Layers?",
        2025,
        "2404.07066",
    ),
    unit="block",
    across=_across,
)
def concept_depth(
    states: Float[Tensor, "examples width"],
    labels: Int64[Tensor, " examples"],
    *,
    learned: float = 0.6,
    seed: int = 42,
    penalty: float = 1.0,
) -> dict[str, float]:
    """Score a block by how well a linear probe reads the class of a text off its last token.

    A logistic regression (L2, C=1) is fitted to 60% of the examples of each class and judged on
    the others.  Concepts that are simple can be read early, those that take inference late or
    never.  Features are brought to mean 0 and deviation 1 first, unlike in the paper: where
    states are large a penalty would count for less.  States are what a block answers; the
    authors' code reads what the norm behind the attention makes of them.

    With acc_l the accuracy at block l of L, from 0:

        jump       largest l / L with acc_l / acc_(l-1) >= 1.1 ; 0 if there is none
        converged  least l / L from which on |acc_m / acc_(m-1) - 1| < 0.03 for all m >= l
        reached    least l / L with acc_l >= 0.95 max acc

    Unlike the paper, `converged` is the least: the largest l with a small change, as the paper's
    text has it, is nearly always the last block.  It is 1 where the last block still changes much.
    A last token is one of padding nowhere.  Of classes of unequal size look at `auc` first.

    Args:
        states: What the block answers at the last token of each text.
        labels: The class of each, from 0.
        learned: Share of the examples that the probe is fitted to.
        seed: Which.
        penalty: How much the size of its weights costs; 1 is C=1.

    Returns:
        On the other examples: `auc`, the score, higher is more: the chance that a text of a class
        is given more of it than one of another, mean over classes; `accuracy`; and `f1`, the mean
        over classes.

    Raises:
        UserError: There is one class, there are few examples, or the share leaves none.
    """
    check_labels(labels)
    if not 0 < learned < 1 or not penalty > 0:
        raise UserError(
            f"a share of {learned} and a penalty of {penalty} are asked for.",
            "Give a share above 0 and below 1, and a penalty above 0.",
        )
    classes = int(labels.max()) + 1
    known = _drawn(labels, learned, seed)
    fitted = probe(states[known], labels[known], classes, penalty=penalty)
    answers, truth = fitted.answers(states[~known]), labels[~known]
    guess = answers.argmax(dim=1)
    there = truth.unique().tolist()
    return {
        "auc": sum(_auc(answers[:, one], truth == one) for one in there) / len(there),
        "accuracy": float((guess == truth).double().mean()),
        "f1": sum(_f1(guess == one, truth == one) for one in there) / len(there),
    }


def _drawn(labels: Int64[Tensor, " examples"], share: float, seed: int) -> Bool[Tensor, " _"]:
    """Which examples are learned from: a share of each class, one at least and not all."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    known = torch.zeros(len(labels), dtype=torch.bool)
    for one in labels.unique():
        members = order[labels[order] == one]
        known[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    return known


def _auc(scores: Float64[Tensor, " examples"], own: Bool[Tensor, " examples"]) -> float:
    """Chance that one of its own is above another, ties half: Mann and Whitney's U."""
    count, others = int(own.sum()), int((~own).sum())
    ranks = torch.from_numpy(stats.rankdata(scores.numpy()))
    return float(ranks[own].sum() - count * (count + 1) / 2) / (count * others)


def _f1(guess: Bool[Tensor, " examples"], own: Bool[Tensor, " examples"]) -> float:
    """2 hits / (guesses + members)."""
    return 2 * int((guess & own).sum()) / (int(guess.sum()) + int(own.sum()))
