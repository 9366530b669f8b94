import os
from pathlib import Path

import pytest
import torch

import layerwise as lw
from layerwise.core.running.fisher import loss_gradient
from layerwise.flow.pairing import DISTURBANCE
from layerwise.flow.preparing import Texts, prepare
from layerwise.measure.sustainability import sustainability

ASSETS = "LAYERWISE_ASSETS"


def test_is_the_mean_relative_change_of_tokens():
    before, after = torch.randn(12, 5), torch.randn(12, 5)
    pairs = zip(before, after, strict=True)
    expected = sum(float((b - a).norm() / b.norm()) for b, a in pairs) / 12
    assert sustainability(before, after) == pytest.approx(expected, rel=1e-6)
    whole = float((before - after).norm() / before.norm())
    assert sustainability(before, after, together=True) == pytest.approx(whole, rel=1e-6)


def test_does_not_see_the_size_of_answers():
    before, after = torch.randn(12, 5), torch.randn(12, 5)
    found = sustainability(1e-3 * before, 1e-3 * after)
    assert found == pytest.approx(sustainability(before, after), rel=1e-5)
    assert sustainability(before, before) == 0


def test_tokens_that_answer_nothing():
    nothing = torch.zeros(4, 3)
    assert sustainability(nothing, nothing) == 0
    assert sustainability(nothing, torch.ones(4, 3)) == 1


@pytest.mark.trained
def test_the_disturbance_goes_up_the_loss_of_a_real_model():
    """The paper's claim: what an attack moves, noise of the same size moves less."""
    if not os.environ.get(ASSETS):
        pytest.skip(f"{ASSETS} is not set")
    assets = Path(os.environ[ASSETS])
    opened = lw.open(str(assets / "models/bytes-wikitext"))
    text = str(assets / "text/wikitext2/valid.txt")
    texts = Texts(text, 8, 64)
    made = prepare(opened.source, opened.structure, [], texts, needing=["a test"], proof="none")
    runner, ids = made.runner, made.calibration.ids
    start = runner.start(ids)
    reach = DISTURBANCE * start.square().mean().sqrt()
    attack = reach * loss_gradient(runner, start, ids).sign()
    noise = reach * torch.randn(start.shape).sign()
    streams = [start, start + attack, start + noise]
    for block in runner.blocks:
        streams = [runner.forward(block, hidden, {}) for hidden in streams]
        plain, attacked, noisy = (hidden.flatten(0, 1) for hidden in streams)
        assert sustainability(plain, attacked) >= 1.2 * sustainability(plain, noisy)
    asked = {"calibration": text, "samples": 8, "length": 64, "cache": False}
    found = lw.inspect(opened.source.label, "sustainability", **asked).scores["sustainability"]
    assert list(found.values())[-1] == pytest.approx(sustainability(plain, attacked), rel=1e-4)
