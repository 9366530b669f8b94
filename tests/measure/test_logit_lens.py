import pytest
import torch

from layerwise.core import catalogue
from layerwise.core.errors import UserError
from layerwise.measure.logit_lens import logit_lens


def _answers(scale=2.0):
    return (scale * torch.randn(5, 6, 11)).log_softmax(dim=-1)


def test_is_what_the_definition_says():
    lens, answers = _answers(), _answers()
    lost, common = [], []
    for window in range(5):
        for place in range(1, 6):
            q, p = lens[window, place].double(), answers[window, place].double()
            lost.append(float((q.exp() * (q - p)).sum()))
            best = [set(one.argsort(descending=True)[:3].tolist()) for one in (q, p)]
            common.append(len(best[0] & best[1]) / 3)
    found = logit_lens(lens.split(2), answers.split(2), top=3)
    assert found == pytest.approx({"kl": sum(lost) / 25, "overlap": sum(common) / 25}, rel=1e-5)


def test_after_the_last_block_the_lens_is_the_answer():
    answers = _answers().split(2)
    assert logit_lens(answers, answers) == {"kl": 0.0, "overlap": 1.0}


def test_what_is_impossible_for_both_is_no_difference():
    answers = _answers()
    answers[..., 3] = -torch.inf
    assert logit_lens([answers], [answers], top=2)["kl"] == 0


@pytest.mark.parametrize("top", [0, 12])
def test_refuses_more_tokens_than_there_are(top):
    with pytest.raises(UserError, match="of 11 tokens"):
        logit_lens([_answers()], [_answers()], top=top)


def test_across_blocks_it_says_how_often_the_divergence_falls():
    across = catalogue.get("measure/logit_lens").across
    records = [{"kl": value} for value in (4.0, 2.0, 3.0, 1.0)]
    assert across(records) == {"centre": pytest.approx(1.1), "falls": pytest.approx(2 / 3)}
