"""The bench of a small vision transformer, barely trained: what it does, not how well."""

import os

import pytest

from layerwise.testing import pictures


@pytest.fixture
def short(monkeypatch):
    if not os.environ.get("LAYERWISE_ASSETS"):
        pytest.skip("LAYERWISE_ASSETS is not set")
    monkeypatch.setattr(pictures, "_STEPS", 3)
    monkeypatch.setattr(pictures, "_BATCH", 8)
    monkeypatch.setattr(pictures, "_TESTED", 40)
    pictures.trained.cache_clear()
    yield
    pictures.trained.cache_clear()


@pytest.mark.trained
def test_the_bench_drops_tokens_and_gives_the_model_back(short):
    seen = []
    model = pictures.trained()
    block = model.vit.layers[2]
    block.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    before = pictures.error(model)
    for method in ("random", "attended", "zero_tprune"):
        seen.clear()
        found = pictures.pictures_loss(method, 0.5, after=[1])
        assert -1 <= found <= 1
        assert {25, 50} == set(seen)
    assert pictures.error(model) == before
    assert pictures.pictures_loss("attended", 1.0, after=[1]) == 0
