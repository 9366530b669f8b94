import pytest
import torch

from layerwise.measure.layer_contribution import layer_contribution


def _both():
    return (2 * torch.randn(2, 5, 7, 11)).log_softmax(dim=-1)


def test_is_the_kl_of_the_second_half():
    answers, frozen = _both()
    terms = [
        float((q.double().exp() * (q - p).double()).sum())
        for window, changed in zip(answers, frozen, strict=True)
        for p, q in zip(window[3:], changed[3:], strict=True)
    ]
    found = layer_contribution(answers.split(2), frozen.split(2))
    assert found == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_may_look_at_the_last_place_alone():
    answers, frozen = _both()
    alone = layer_contribution([answers[:, -1:]], [frozen[:, -1:]])
    assert layer_contribution([answers], [frozen], last=True) == pytest.approx(alone)


def test_is_0_where_the_answer_does_not_move():
    answers, _ = _both()
    assert layer_contribution([answers], [answers]) == 0
