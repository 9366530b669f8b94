import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from layerwise.measure._probe import probe


def _examples(classes, width, count=120):
    labels = torch.arange(count) % classes
    states = torch.randn(count, width) * torch.rand(width) * 10
    states[:, : min(width, classes)] += torch.eye(classes, min(width, classes))[labels]
    return states, labels


@pytest.mark.parametrize("penalty", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("width", [1, 5, 300])
@pytest.mark.parametrize("classes", [2, 4])
def test_is_scikit_learn_s_logistic_regression(classes, width, penalty):
    states, labels = _examples(classes, width)
    features = StandardScaler().fit_transform(states.double().numpy())
    reference = LogisticRegression(C=1 / penalty, max_iter=5000, tol=1e-8)
    expected = reference.fit(features, labels).predict_log_proba(features)
    found = probe(states, labels, classes, penalty=penalty).answers(states)
    assert found.allclose(torch.from_numpy(expected), atol=1e-4)


def test_features_that_say_nothing_have_no_weight():
    states, labels = _examples(3, 4)
    padded = torch.cat([states, torch.full((120, 2), 1e4)], dim=1)
    alone = probe(states, labels, 3).answers(states)
    assert probe(padded, labels, 3).answers(padded).allclose(alone, atol=1e-6)


def test_a_class_that_was_not_seen_stays_possible():
    states, labels = _examples(2, 4)
    found = probe(states, labels, 3, bias_penalty=1.0).answers(states)
    assert found.isfinite().all()
    assert found[:, 2].exp().max() < 0.5


def test_learns_from_a_single_example():
    states, labels = _examples(2, 4)
    answers = probe(states[:1], labels[:1], 2, bias_penalty=1.0).answers(states)
    assert answers.isfinite().all()
