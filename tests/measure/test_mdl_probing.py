import math

import pytest
import torch

from layerwise.core import catalogue
from layerwise.core.errors import UserError
from layerwise.measure._probe import probe
from layerwise.measure.mdl_probing import mdl_probing


def _examples(count=200, classes=4):
    labels = torch.arange(count) % classes
    return torch.randn(count, 6) + 2 * torch.eye(classes, 6)[labels], labels


def _sent(states, labels, order):
    """The message's length, and how often its last probe was right, label by label."""
    fractions = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1)
    ends = [math.floor(one * 200) for one in fractions if math.floor(one * 200)]
    bits, right = 0.0, 0
    for place, example in enumerate(order.tolist()):
        known = order[: max([0, *(end for end in ends if end <= place)])]
        if not len(known):
            bits += math.log2(4)
            continue
        fitted = probe(states[known], labels[known], 4, penalty=6.0, bias_penalty=1.0)
        answer = fitted.answers(states[example : example + 1])[0]
        bits -= float(answer[labels[example]]) / math.log(2)
        right += (place >= 100) * int(answer.argmax() == labels[example])
    return bits, right / 100


def test_is_the_length_of_the_message_sent_label_by_label():
    states, labels = _examples()
    order, dealt = (
        torch.randperm(200, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )
    bits, accuracy = _sent(states, labels, order)
    control = 400 / _sent(states, labels[dealt], torch.arange(200))[0]
    found = mdl_probing(states, labels, shuffles=1)
    expected = {
        "compression": 400 / bits,
        "bits": bits,
        "accuracy": accuracy,
        "control": control,
    }
    assert found == pytest.approx(expected, rel=1e-4)
    assert control < 1.02


def test_states_that_say_nothing_do_not_shorten_the_message():
    _, labels = _examples()
    assert mdl_probing(torch.ones(200, 6), labels)["compression"] == pytest.approx(1, abs=0.05)
    shuffled = labels[torch.randperm(200)]
    assert mdl_probing(torch.randn(200, 6), shuffled)["compression"] < 1.02


def test_states_that_say_all_leave_little_to_send():
    states = torch.eye(4)[torch.arange(1000) % 4]
    found = mdl_probing(states, torch.arange(1000) % 4)
    assert found["compression"] > 10
    assert found["accuracy"] == 1


def test_a_feature_of_another_size_changes_nothing():
    states, labels = _examples()
    larger = mdl_probing(5 * states, labels)
    assert larger == pytest.approx(mdl_probing(states, labels), rel=1e-4)


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (torch.zeros(60, dtype=torch.long), "2? ?classes or more|1 classes"),
        (torch.arange(10) % 2, "too few"),
        (torch.arange(60), "one text alone"),
    ],
)
def test_refuses_what_no_probe_can_learn(labels, told):
    with pytest.raises(UserError, match=told):
        mdl_probing(torch.randn(len(labels), 4), labels)


@pytest.mark.parametrize("options", [{"shuffles": 0}, {"penalty": 0.0}])
def test_refuses_options_that_ask_for_nothing(options):
    with pytest.raises(UserError):
        mdl_probing(*_examples(), **options)


def test_across_blocks_it_names_the_best():
    across = catalogue.get("measure/mdl_probing").across
    told = across([{"compression": value} for value in (1.0, 3.0, 2.0)])
    assert told == {"best": 1.0, "centre": pytest.approx((2 * 1 + 1 * 2) / 3)}
    assert across([{"compression": 1.0}]) == {"best": 0.0, "centre": 0.0}
