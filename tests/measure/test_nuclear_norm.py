import math
import os
from pathlib import Path

import pytest
import torch
from scipy import stats
from trained import ASSETS

import layerwise as lw
from layerwise.flow.preparing import Texts, prepare
from layerwise.measure.nuclear_norm import nuclear_norm


def directions(outputs):
    centred = outputs.double() - outputs.double().mean(dim=0)
    return centred / centred.norm(dim=1, keepdim=True)


def by_definition(outputs):
    """Column by column."""
    count, width = outputs.shape
    rows = directions(outputs)
    norms = sorted(
        math.sqrt(sum(float(rows[i, j]) ** 2 for i in range(count))) for j in range(width)
    )
    return sum(norms[-min(count, width) :]) / count


def scaled(power, side=128):
    """Noise of which the j-th entry is j^-power as large."""
    noise = torch.Generator().manual_seed(0)
    return torch.randn(side, side, generator=noise) * torch.arange(1, side + 1) ** -power


@pytest.mark.parametrize("shape", [(50, 16), (10, 30), (16, 16), (2, 3)])
def test_is_the_sum_of_the_largest_column_norms_for_each_token(shape):
    outputs = torch.randn(*shape) * torch.rand(shape[1]) + 3
    assert nuclear_norm(outputs, columns=True) == pytest.approx(by_definition(outputs))
    singular = torch.linalg.svdvals(directions(outputs))
    found = nuclear_norm(outputs)
    assert found == pytest.approx(float(singular.sum()) / len(outputs), rel=1e-5)


def test_more_tokens_than_are_taken_at_a_time_are_one_matrix():
    outputs = torch.randn(2500, 8) * torch.rand(8)
    assert nuclear_norm(outputs, columns=True) == pytest.approx(by_definition(outputs))


def test_columns_at_right_angles_make_it_exact():
    """Each token along one of the entries, both ways: the mean is 0."""
    outputs = torch.cat([torch.eye(6), -torch.eye(6)]) * torch.rand(6)
    expected = math.sqrt(12 * 6) / 12
    assert nuclear_norm(outputs, columns=True) == pytest.approx(expected)
    assert nuclear_norm(outputs) == pytest.approx(expected)


def test_tokens_along_one_entry_score_least():
    outputs = torch.zeros(9, 5)
    outputs[:, 2] = torch.randn(9)
    assert nuclear_norm(outputs, columns=True) == pytest.approx(1 / 3)
    assert nuclear_norm(outputs) == pytest.approx(1 / 3)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.7, 1e30])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("columns", [False, True])
def test_equal_tokens_have_no_direction(value, tokens, columns):
    assert nuclear_norm(torch.full((tokens, 5), value), columns=columns) == 0


def test_ranks_as_the_nuclear_norm_does_unless_the_stream_is_turned():
    """The card's figures: the same ranks, but in another basis hardly any range."""
    powers = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    turn = torch.linalg.qr(torch.randn(128, 128)).Q
    exact = [nuclear_norm(scaled(power)) for power in powers]
    plain = [nuclear_norm(scaled(power), columns=True) for power in powers]
    turned = [nuclear_norm(scaled(power) @ turn, columns=True) for power in powers]
    assert stats.spearmanr(plain, exact).statistic >= 0.95
    assert plain[0] - plain[-1] >= 0.8 * (exact[0] - exact[-1])
    assert turned[0] - turned[-1] <= 0.2 * (exact[0] - exact[-1])


@pytest.mark.parametrize("name", ["reference-6m", "stories-char-940k"])
def test_ranks_the_blocks_of_a_trained_model_as_their_entropy_does(name):
    """On texts of 64 tokens; the column norms rank them in reverse."""
    if ASSETS not in os.environ:
        pytest.skip(f"{ASSETS} is not set")
    assets = Path(os.environ[ASSETS])
    opened = lw.open(assets / "models" / name)
    text = [(assets / "text/wikitext2/valid.txt").read_text(encoding="utf-8")[:20000]]
    texts = Texts(text, 6, 64, text, 1, noise_floor=False)
    made = prepare(opened.source, opened.structure, [], texts, needing=["a test"])
    assert made.runner is not None
    assert made.calibration is not None
    hidden = made.runner.start(made.calibration.ids)
    blocks = []
    for block in made.runner.blocks:
        hidden = made.runner.forward(block, hidden, {})
        blocks.append(
            [
                sum(score(states) for states in hidden)
                for score in (nuclear_norm, entropy, by_columns)
            ]
        )
    exact, entropies, stand_in = zip(*blocks, strict=True)
    assert stats.spearmanr(exact, entropies).statistic >= 0.9
    assert stats.spearmanr(stand_in, entropies).statistic <= -0.9


def by_columns(outputs):
    return nuclear_norm(outputs, columns=True)


def entropy(outputs):
    """Of the eigenvalues of X^T X / L, which add up to 1."""
    shares = torch.linalg.svdvals(directions(outputs)).square() / len(outputs)
    return -float(torch.xlogy(shares, shares).sum())
