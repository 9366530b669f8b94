import pytest
import torch

import layerwise as lw
from layerwise.measure.sign_similarity import sign_similarity


def test_is_the_share_of_equal_signs():
    ours, theirs = torch.randn(7, 5), torch.randn(7, 5)
    ours[0, 0] = theirs[0, 0] = 0.0
    ours[0, 1] = 0.0
    equal = sum(
        (float(a) > 0) - (float(a) < 0) == (float(b) > 0) - (float(b) < 0)
        for a, b in zip(ours.flatten(), theirs.flatten(), strict=True)
    )
    assert sign_similarity(ours, theirs) == pytest.approx(-equal / 35)
    assert sign_similarity(ours, 3 * ours) == -1
    assert sign_similarity(ours.abs() + 1, -ours.abs() - 1) == 0


def test_a_model_and_itself_have_the_same_signs(llama):
    text = torch.arange(32).reshape(2, 16)
    shown = {"calibration": text, "samples": 2, "length": 16, "cache": False}
    scores = lw.inspect(llama, "sign_similarity", against=llama, **shown).scores
    assert set(scores["sign_similarity"].values()) == {-1.0}
