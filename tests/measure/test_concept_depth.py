import pytest
import torch
from sklearn import metrics

from layerwise.core import catalogue
from layerwise.core.errors import UserError
from layerwise.measure._probe import probe
from layerwise.measure.concept_depth import _drawn, concept_depth

across = catalogue.get("measure/concept_depth").across


def _examples(classes, count=150):
    labels = torch.arange(count).pow(2) % classes if classes > 2 else torch.arange(count) % 2
    labels = labels.unique(return_inverse=True)[1]
    return torch.randn(count, 5) + torch.randn(int(labels.max()) + 1, 5)[labels], labels


@pytest.mark.parametrize("classes", [2, 7])
def test_is_what_scikit_learn_says_of_the_other_examples(classes):
    states, labels = _examples(classes)
    known = _drawn(labels, 0.6, 42)
    count = int(labels.max()) + 1
    answers = probe(states[known], labels[known], count).answers(states[~known])
    truth, guess = labels[~known].numpy(), answers.argmax(dim=1).numpy()
    chances = answers.exp().numpy()
    if count == 2:
        auc = metrics.roc_auc_score(truth, chances[:, 1])
    else:
        auc = metrics.roc_auc_score(truth, chances, multi_class="ovr")
    expected = {
        "auc": auc,
        "accuracy": metrics.accuracy_score(truth, guess),
        "f1": metrics.f1_score(truth, guess, average="macro"),
    }
    assert concept_depth(states, labels) == pytest.approx(expected, abs=1e-6)


def test_learns_from_the_share_of_each_class_and_judges_by_the_others():
    labels = torch.cat([torch.zeros(50), torch.ones(20), torch.full((2,), 2)]).long()
    known = _drawn(labels, 0.6, 0)
    assert [int((known & (labels == one)).sum()) for one in range(3)] == [30, 12, 1]


def test_labels_that_mean_nothing_are_guessed_by_luck():
    states, labels = _examples(2, 1000)
    shuffled = labels[torch.randperm(1000)]
    found = concept_depth(states, shuffled)
    assert abs(found["accuracy"] - 0.5) < 3 * (0.25 / 400) ** 0.5
    assert abs(found["auc"] - 0.5) < 0.1


def test_a_class_that_states_show_is_always_read():
    labels = torch.arange(60) % 3
    assert concept_depth(torch.eye(3)[labels], labels) == {"auc": 1.0, "accuracy": 1.0, "f1": 1.0}


def test_the_profile_is_where_the_accuracy_moves():
    told = across([{"accuracy": one} for one in (0.5, 0.56, 0.57, 0.8, 0.81)])
    assert told == {"jump": 3 / 5, "converged": 4 / 5, "reached": 3 / 5}
    assert across([{"accuracy": 0.7}] * 4) == {"jump": 0, "converged": 1 / 4, "reached": 0}
    assert across([{"accuracy": 0.5}, {"accuracy": 0.9}])["converged"] == 1


@pytest.mark.parametrize("options", [{"learned": 1.0}, {"learned": 0.0}, {"penalty": -1.0}])
def test_refuses_options_that_ask_for_nothing(options):
    with pytest.raises(UserError):
        concept_depth(*_examples(2), **options)


def test_refuses_one_class():
    with pytest.raises(UserError, match="two classes"):
        concept_depth(torch.randn(50, 4), torch.zeros(50, dtype=torch.long))
