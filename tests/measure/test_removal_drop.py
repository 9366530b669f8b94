import pytest
import torch
from torch.nn import functional

from layerwise.core import catalogue
from layerwise.measure.removal_drop import removal_drop


def test_is_what_the_definition_says():
    logits, changed = torch.randn(2, 5, 7, 11)
    ids = torch.randint(11, (5, 7))
    losses = [
        functional.cross_entropy(one[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for one in (logits, changed)
    ]
    p, q = (one[:, :-1].double().softmax(dim=-1) for one in (logits, changed))
    kl = (p * (p / q).log()).sum(dim=-1).mean()
    parts = (one.log_softmax(dim=-1).split(2) for one in (logits, changed))
    found = removal_drop(*parts, ids)
    expected = {"drop": float(losses[1] - losses[0]), "kl": float(kl)}
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_block_that_is_not_missed_is_idle():
    across = catalogue.get("measure/removal_drop").across
    told = across([{"drop": drop} for drop in (0.5, 0.01, -0.1, 0.02)])
    assert told == {"idle": 0.5, "idle_late": 0.5}
