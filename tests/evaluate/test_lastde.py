import itertools
import math

import pytest
import torch

from layerwise.core.errors import UserError
from layerwise.evaluate.lastde import auroc, diversity_entropy, lastde, lastde_plus, scores


def _entropy(values, window, bins):
    windows = [values[n : n + window] for n in range(len(values) - window + 1)]
    counts = [0] * bins
    for one, other in itertools.pairwise(windows):
        size = math.hypot(*one) * math.hypot(*other)
        cosine = sum(a * b for a, b in zip(one, other, strict=True)) / size
        counts[min(bins - 1, int((min(1.0, cosine) + 1) / 2 * bins))] += 1
    shares = [count / sum(counts) for count in counts if count]
    return -sum(share * math.log(share) for share in shares) / math.log(bins)


def _lastde(values, window, bins, scales):
    found = []
    for scale in range(1, scales + 1):
        means = [sum(values[n : n + scale]) / scale for n in range(len(values) - scale + 1)]
        found.append(_entropy(means, window, bins * len(values)))
    mean = sum(found) / scales
    spread = math.sqrt(sum((one - mean) ** 2 for one in found) / (scales - 1))
    return sum(values) / len(values) / spread


def test_the_entropy_is_that_of_the_authors_example():
    series = torch.tensor([1.0, 2, 13, 7, 9, 5, 4])
    assert float(diversity_entropy(series, window=3, bins=10)) == pytest.approx(math.log10(2))


@pytest.mark.parametrize(("window", "bins", "scales"), [(3, 10, 5), (4, 8, 15), (2, 1, 2)])
def test_is_what_the_definition_says(window, bins, scales):
    series = -torch.empty(4, 60).double().exponential_()
    expected = [_lastde(row, window, bins, scales) for row in series.tolist()]
    found = lastde(series, window=window, bins=bins, scales=scales)
    assert found.tolist() == pytest.approx(expected)


def test_a_series_that_never_moves_has_a_score():
    assert diversity_entropy(torch.full((40,), -2.0), window=3, bins=10) == 0
    assert float(lastde(torch.full((40,), -2.0))) == pytest.approx(-2e6)
    assert float(lastde(torch.zeros(40))) == 0


@pytest.mark.parametrize(("window", "bins", "length"), [(3, 1, 20), (0, 5, 20), (3, 5, 3)])
def test_refuses_what_has_no_entropy(window, bins, length):
    with pytest.raises(UserError, match="no entropy"):
        diversity_entropy(torch.rand(length), window=window, bins=bins)


def test_refuses_texts_that_are_too_short():
    with pytest.raises(UserError, match="18 tokens or more"):
        lastde(-torch.rand(17))
    with pytest.raises(UserError, match="two scales"):
        lastde(-torch.rand(40), scales=1)


def _answers(tokens=60, vocabulary=30):
    return (2 * torch.randn(tokens, vocabulary)).log_softmax(dim=-1)


def test_what_the_model_writes_itself_scores_about_0():
    found = []
    for seed in range(60):
        answers = _answers()
        ids = answers.exp().multinomial(1)[:, 0]
        found.append(lastde_plus(answers, ids, samples=40, scales=5, seed=seed))
    assert abs(sum(found) / 60) < 0.5
    assert 0.5 < float(torch.tensor(found).std()) < 2


def test_plus_is_lastde_beside_that_of_draws():
    answers = _answers()
    ids = torch.randint(30, (60,))
    drawn = (
        answers.double()
        .exp()
        .multinomial(7, replacement=True, generator=torch.Generator().manual_seed(3))
    )
    how = {"window": 4, "bins": 8, "scales": 15}
    own = float(lastde(answers.gather(1, ids[:, None])[:, 0], **how))
    others = torch.stack([lastde(answers.gather(1, one[:, None])[:, 0], **how) for one in drawn.T])
    expected = (own - float(others.mean())) / float(others.std())
    assert lastde_plus(answers, ids, samples=7, seed=3) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UserError, match="no deviation"):
        lastde_plus(answers, ids, samples=1)


def test_scores_are_named():
    assert list(scores(_answers(), torch.randint(30, (60,)))) == [
        "likelihood",
        "lastde",
        "lastde++",
    ]


def test_the_area_counts_pairs():
    found = torch.tensor([3.0, 1.0, 2.0, 1.0])
    assert auroc(found, torch.tensor([True, True, False, False])) == (1 + 1 + 0 + 0.5) / 4
