"""How far a network learns from its input: attention and answers on items with labels.

from layerwise.training import Watch
from layerwise.training.in_context import InContext

watch = Watch(model, [], every=100, probes=[InContext(tokens, told)])
...
watch.transition("accuracy").half      # the step of half the rise
watch.transition("item_label").half    # earlier: the first half of the circuit
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from layerwise.core.errors import UserError
from layerwise.core.running.products import attention_maps

Map = Float[Tensor, "sequences heads length length"]


class Sequences(NamedTuple):
    """What stands in sequences of items, a label behind each, and a target that is an item.

    Attributes:
        items: The class of each item, (sequences, N).
        target: That of the target, (sequences,).
        labels: The label behind each item, (sequences, N).
        answer: The target's label, (sequences,).
    """

    items: Int64[Tensor, "sequences pairs"]
    target: Int64[Tensor, " sequences"]
    labels: Int64[Tensor, "sequences pairs"]
    answer: Int64[Tensor, " sequences"]


class InContext:
    """Progress measures of in-context learning, as a probe of a `Watch`.

    Args:
        tokens: A batch of what the model is called with: 2 N + 1 tokens in each sequence, items
            and labels in turn, and the target.
        told: What stands in them.
        name: Put before each figure, with a point; for probes of several kinds of sequences, such
            as novel classes and known ones whose labels were changed.
        layers: Places, among the attentions of the model, of the first and the second one of the
            circuit.
    """

    def __init__(
        self, tokens: Tensor, told: Sequences, *, name: str = "", layers: tuple[int, int] = (0, -1)
    ) -> None:
        self.tokens = tokens
        self.told = told
        self.name = name
        self.layers = layers

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The figures of `progress`, of the model as it is.

        Raises:
            UserError: The model calls no attention that can be seen, or has no such layer.
        """
        with torch.no_grad():
            answer, maps = attention_maps(model, self.tokens)
        if not maps or not all(-len(maps) <= place < len(maps) for place in self.layers):
            raise UserError(
                f"{type(model).__name__} calls torch's scaled_dot_product_attention {len(maps)} "
                f"times, and the attentions at {self.layers} are asked for.",
                "Give other layers, or have the model attend by that function.",
            )
        first, second = (maps[place] for place in self.layers)
        found = progress(first, second, answer, self.told)
        return {f"{self.name}.{one}".lstrip("."): value for one, value in found.items()}


def progress(
    first: Map, second: Map, logits: Float[Tensor, "sequences labels"], told: Sequences
) -> dict[str, float]:
    """How much of an induction head there is, and what it comes to.

    Reddy, "The mechanistic basis of data dependence and abrupt learning in an in-context
    classification task", 2024 (arXiv:2312.03002).  A network copies the label of the item that is
    like the target in two steps: in a first layer each label's token looks at the item before it,
    in a later one the target looks at labels of items of its class.  With the attention A1 and A2,
    rows the tokens that look, of the item j at 2 j, its label at 2 j + 1, and the target last:

        item_label    mean over j of A1[2 j + 1, 2 j]
        target_item   sum over items j of the target's class of A2[target, 2 j]
        target_label  sum over the same j of A2[target, 2 j + 1]
        context       probability that the answer is one of the labels in the sequence
        accuracy      share of sequences of which the likeliest label is the target's

    Means over sequences; of several heads that one counts for each figure which has the most.
    `context` rises first: it says that some label of the sequence is copied, not which, so
    `accuracy` is only beyond chance where it is above the share of the most frequent label there.

    Args:
        first: A1; every row sums to 1.
        second: A2.
        logits: What is answered.
        told: What stands in the sequences.

    Raises:
        UserError: Sequences are not as long as their items and labels and a target.
    """
    length = 2 * told.items.shape[1] + 1
    if first.shape[-1] != length or second.shape[-1] != length:
        raise UserError(
            f"attention is over {second.shape[-1]} tokens, and {told.items.shape[1]} items with "
            f"their labels and a target are {length}.",
            "Give sequences of items and labels in turn, and a target behind them.",
        )
    own = told.items == told.target[:, None]  # (sequences, pairs)
    looked = second[:, :, -1, :-1].double()  # (sequences, heads, 2 pairs)
    before = first.double().diagonal(offset=-1, dim1=2, dim2=3)[..., ::2]
    chances = logits.double().softmax(dim=-1)
    there = torch.zeros(chances.shape, dtype=torch.bool).scatter(1, told.labels, value=True)
    return {
        "item_label": _best(before.mean(dim=-1)),
        "target_item": _best(_on(looked[..., ::2], own)),
        "target_label": _best(_on(looked[..., 1::2], own)),
        "context": float((chances * there).sum(dim=1).mean()),
        "accuracy": float((logits.argmax(dim=1) == told.answer).double().mean()),
    }


def _on(
    looked: Float64[Tensor, "sequences heads pairs"], own: Bool[Tensor, "sequences pairs"]
) -> Float64[Tensor, "sequences heads"]:
    return (looked * own[:, None]).sum(dim=-1)


def _best(found: Float64[Tensor, "sequences heads"]) -> float:
    return float(found.mean(dim=0).max())


class Transition(NamedTuple):
    """When a figure rose, in steps of training.

    Attributes:
        begun: The first step at which it had a tenth of its rise to the last record.
        half: The same with half of it.
        done: The same with nine tenths.
        steepest: The last step of the five records in which it rose most.
    """

    begun: int
    half: int
    done: int
    steepest: int


def transition(
    steps: Sequence[int],
    values: Sequence[float],
    *,
    chance: float | None = None,
    over: int = 5,
) -> Transition:
    """When a figure rose.

    A figure that fell has fallen by a tenth, half and nine tenths then.  Noise counts: of a figure
    that hardly moved the steps say nothing.

    Args:
        steps: Of the records, ascending.
        values: The figure at each.
        chance: What counts as nothing learned, instead of the first record's; for an accuracy, the
            share of the most frequent label in a sequence.
        over: Records over which the steepest rise is looked for; all, where there are fewer.

    Raises:
        UserError: There is one record or none.
    """
    if len(steps) < 2:
        raise UserError(
            f"{len(steps)} records show no transition.", "Record a step more, or more often."
        )
    first = values[0] if chance is None else chance
    sign = 1 if values[-1] >= first else -1
    risen = [sign * (value - first) for value in values]
    begun, half, done = (
        next(step for step, one in zip(steps, risen, strict=True) if one >= share * risen[-1])
        for share in (0.1, 0.5, 0.9)
    )
    apart = min(over, len(steps) - 1)
    gains = [after - before for before, after in zip(risen, risen[apart:], strict=False)]
    return Transition(begun, half, done, steps[apart + gains.index(max(gains))])
