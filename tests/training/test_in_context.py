"""In-context learning of items with labels: measures, the task, and what the paper claims."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from layerwise.core.errors import UserError
from layerwise.testing.in_context import Network, Task, train
from layerwise.training import Watch
from layerwise.training.in_context import InContext, Sequences, progress, transition

PAIRS, LABELS = 4, 8


def drawn(count=6):
    tokens, told = Task(classes=20).sequences(count, torch.Generator().manual_seed(3))
    return tokens, told


def even(count, length):
    maps = torch.ones(count, 1, length, length).tril()
    return maps / maps.sum(dim=-1, keepdim=True)


def test_is_what_the_definition_says():
    _, told = drawn()
    length = 2 * PAIRS + 1
    first, second = (torch.rand(6, 2, length, length).softmax(-1) for _ in range(2))
    logits = torch.randn(6, LABELS)
    heads = {"item_label": [], "target_item": [], "target_label": []}
    for head in range(2):
        sums = dict.fromkeys(heads, 0.0)
        for s in range(6):
            for j in range(PAIRS):
                sums["item_label"] += float(first[s, head, 2 * j + 1, 2 * j]) / PAIRS
                if told.items[s, j] == told.target[s]:
                    sums["target_item"] += float(second[s, head, -1, 2 * j])
                    sums["target_label"] += float(second[s, head, -1, 2 * j + 1])
        for name, value in sums.items():
            heads[name].append(value / 6)
    found = progress(first, second, logits, told)
    for name, values in heads.items():
        assert found[name] == pytest.approx(max(values), rel=1e-5)
    chances = logits.softmax(-1)
    there = [sum(float(chances[s, one]) for one in set(told.labels[s].tolist())) for s in range(6)]
    assert found["context"] == pytest.approx(sum(there) / 6, rel=1e-5)
    right = [int(logits[s].argmax()) == int(told.answer[s]) for s in range(6)]
    assert found["accuracy"] == pytest.approx(sum(right) / 6)


def test_attention_that_looks_everywhere():
    """The card's figures: 1 / (j + 1) of each item, and B of the 2 N + 1 tokens."""
    _, told = drawn()
    maps = even(6, 2 * PAIRS + 1)
    found = progress(maps, maps, torch.zeros(6, LABELS), told)
    assert found["item_label"] == pytest.approx(sum(1 / (2 * j + 2) for j in range(4)) / 4)
    assert found["target_label"] == pytest.approx(2 / 9)
    assert found["target_item"] == pytest.approx(2 / 9)


def test_a_head_made_by_hand_is_perfect():
    _, told = drawn()
    length = 2 * PAIRS + 1
    first, second = torch.zeros(2, 6, 1, length, length)
    first[:, :, torch.arange(length), (torch.arange(length) - 1).clamp(min=0)] = 1
    own = (told.items == told.target[:, None]).float()
    second[:, 0, -1, 1::2] = own / own.sum(dim=1, keepdim=True)
    logits = torch.zeros(6, LABELS)
    for s in range(6):
        for j in range(PAIRS):
            logits[s, told.labels[s, j]] += 50 * second[s, 0, -1, 2 * j + 1]
    found = progress(first, second, logits, told)
    assert found == pytest.approx(
        {"item_label": 1, "target_item": 0, "target_label": 1, "context": 1, "accuracy": 1}
    )


def test_sequences_of_another_length_are_refused():
    _, told = drawn()
    maps = even(6, 8)
    with pytest.raises(UserError, match="4 items with their labels and a target are 9"):
        progress(maps, maps, torch.zeros(6, LABELS), told)
    with pytest.raises(UserError, match="0 times"):
        InContext(torch.zeros(2, 3), told)(nn.Linear(3, 2))


def test_when_a_figure_rose():
    steps = list(range(0, 110, 10))
    values = [0.0, 0.0, 0.05, 0.1, 0.2, 0.6, 0.85, 0.9, 0.95, 1.0, 1.0]
    assert transition(steps, values, over=2) == (30, 50, 70, 60)
    assert transition(steps, [-one for one in values], over=2) == (30, 50, 70, 60)
    assert transition(steps, values, chance=0.5).half == 60
    assert transition([0, 5], [1.0, 2.0]) == (5, 5, 5, 5)
    with pytest.raises(UserError, match="1 records"):
        transition([0], [1.0])


def test_the_task_is_what_the_paper_s_is():
    task = Task(classes=40, pairs=4, bursts=2)
    draw = torch.Generator().manual_seed(0)
    tokens, told = task.sequences(500, draw)
    assert tokens.shape == (500, 9, task.size)
    places, content = tokens.split([task.places, task.width], dim=2)
    at = places.argmax(dim=2)
    assert torch.equal(at - at[:, :1], torch.arange(9).expand(500, -1))
    assert len(at[:, 0].unique()) == task.places - 8
    for row, target in zip(told.items, told.target, strict=True):
        counts = row.bincount()
        assert set(counts[counts > 0].tolist()) == {2}
        assert target in row
    assert torch.equal(told.labels, told.items % 8)
    assert torch.equal(told.answer, told.target % 8)
    # Labels have one vector each; items of a class are alike but for the noise.
    assert torch.equal(content[0, 1], task._vectors[told.labels[0, 0]])
    gap = content[:, 0::2][:, :4] - task._means[told.items] / math.sqrt(1.01)
    assert float(gap.square().sum(-1).mean()) == pytest.approx(0.01 / 1.01, rel=0.1)
    flipped = task.sequences(50, draw, flipped=True)[1]
    assert torch.equal(flipped.answer, (flipped.target + 1) % 8)
    apart = task.sequences(2000, draw, bursts=0)[1]
    inside = (apart.items == apart.target[:, None]).any(dim=1).float().mean()
    assert float(inside) == pytest.approx(1 - (1 - 1 / 40) ** 4, abs=0.02)
    novel = task.sequences(200, draw, novel=True)[1]
    assert (novel.items == novel.target[:, None]).any(dim=1).all()
    same = novel.items == novel.target[:, None]
    assert (novel.labels[same] == novel.answer[:, None].expand(-1, 4)[same]).all()


def test_training_is_recorded_and_does_not_notice():
    task = Task(classes=20)
    probe = InContext(*task.sequences(50, torch.Generator().manual_seed(1), novel=True), name="new")
    watches = []

    def seen(network, step):
        if not watches:
            watches.append(Watch(network, ["displacement"], every=2, probes=[probe]))
        watches[0].step(step)
        return False

    watched, plain = train(task, steps=6, seen=seen), train(task, steps=6)
    for one, other in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    assert watched.training
    records = watches[0].records
    assert [record.step for record in records] == [0, 2, 4, 6]
    assert records[-1].told == probe(watched)
    assert "new.accuracy" in records[0].told
    assert "displacement" in records[0].scores
    moved = watches[0].transition("displacement", "attention.0.query")
    assert moved.begun <= moved.half <= moved.done
    assert watches[0].transition("new.context").steepest == 6


@functools.cache
def _reduced(steps=1500, rate=1.5):
    """The two-parameter network: its loss, and the two gates, through gradient descent.

    A token looks at the one before with p1 = e^b1 / (e^b1 + n1); what it finds lets the target look
    at the right label with p2 = e^(b2 p1) / (e^(b2 p1) + n2), which gives the answer's logit.
    """
    gates = torch.tensor([0.0, 0.0, 0.5], requires_grad=True)
    seen = []
    for _ in range(steps):
        p1 = gates[0].exp() / (gates[0].exp() + 8)
        z2 = gates[1] * p1
        p2 = z2.exp() / (z2.exp() + 8)
        z3 = gates[2] * p2
        loss = -(z3 - torch.log(z3.exp() + 7))
        seen.append((float(p1.detach()), float(p2.detach()), float((-loss.detach()).exp())))
        (slope,) = torch.autograd.grad(loss, gates)
        gates.data -= rate * slope
    return seen


def test_the_two_parameter_network_waits_and_jumps():
    """Nested gates: nothing happens for long, then all of it; the figures find when."""
    found = _reduced()
    when = transition(list(range(len(found))), [one[2] for one in found])
    assert found[-1][2] > 0.9
    assert when.done - when.begun <= when.done / 2
    assert when.begun < when.half < when.done


def _answers(network, tokens, cut):
    """What a network answers, with the labels' look at their items cut from its first layer."""
    with torch.no_grad():
        for number, layer in enumerate(network.attention):
            asked, kept, told = (one(tokens) for one in (layer.query, layer.key, layer.value))
            maps = asked @ kept.mT / asked.shape[-1] ** 0.5
            seen = torch.ones(maps.shape[1:], dtype=torch.bool).tril()
            maps = maps.where(seen, -torch.inf).softmax(-1)
            if cut and not number:
                places = torch.arange(1, maps.shape[1], 2)
                maps[:, places, places - 1] = 0
            tokens = tokens + maps @ told
        return network.classifier(tokens[:, -1])


def test_the_network_is_attention_written_out():
    tokens, _ = drawn()
    network = Network(Task(classes=20))
    expected = network(tokens)
    assert torch.allclose(_answers(network, tokens, cut=False), expected, atol=1e-5)
    assert functional.cross_entropy(expected, torch.zeros(6, dtype=torch.long)).requires_grad


def test_figures_take_sequences_as_they_are():
    tokens, told = drawn()
    network = Network(Task(classes=20))
    found = InContext(tokens, Sequences(*told))(network)
    assert set(found) == {"item_label", "target_item", "target_label", "context", "accuracy"}


@functools.cache
def _learned():
    """A network that learns in context: its records, and it, at the end.

    The card's task with K = 4096 classes instead of 256, and steps of 3e-3 instead of 1e-3, until
    97% of novel sequences are right: with 256 classes it learns in its weights (15 seconds).
    """
    draw = torch.Generator().manual_seed(5)
    task = Task(classes=4096)
    tokens, told = task.sequences(500, draw, novel=True)
    watches = []

    def seen(network, step):
        if not watches:
            watches.append(Watch(network, [], every=20, probes=[InContext(tokens, told)]))
        watches[0].step(step)
        return min(record.told["accuracy"] for record in watches[0].records[-3:]) >= 0.97

    return train(task, steps=2000, rate=3e-3, seen=seen), watches[0], tokens, told


@pytest.mark.trained
def test_the_answer_is_some_label_there_before_it_is_the_right_one():
    watch = _learned()[1]
    assert watch.records[-1].told["accuracy"] >= 0.97
    right = watch.transition("accuracy", chance=0.5)
    assert watch.transition("context").half <= right.half
    assert watch.transition("item_label").begun <= right.half


@pytest.mark.trained
def test_without_the_look_at_items_nothing_is_copied_better_than_by_chance():
    network, _, tokens, told = _learned()
    right = [
        float((_answers(network, tokens, cut).argmax(1) == told.answer).double().mean())
        for cut in (False, True)
    ]
    assert right[0] >= 0.95
    assert right[1] <= 0.5 + 0.1


@pytest.mark.trained
@pytest.mark.xfail(strict=True, reason="420 steps against 400: item_label rises on to the end")
def test_labels_look_at_their_items_before_the_answer_is_right():
    watch = _learned()[1]
    right = watch.transition("accuracy", chance=0.5)
    assert watch.transition("item_label").half <= right.half


@pytest.mark.trained
@pytest.mark.xfail(strict=True, reason="0.67: the network answers right with less")
def test_the_target_looks_at_little_but_its_labels():
    assert _learned()[1].records[-1].told["target_label"] >= 0.7


@pytest.mark.trained
@pytest.mark.xfail(
    strict=True, reason="420 steps for the rise, 120 before it: no plateau of length"
)
def test_the_accuracy_rises_at_once():
    right = _learned()[1].transition("accuracy", chance=0.5)
    assert right.done - right.begun <= 0.25 * right.begun
