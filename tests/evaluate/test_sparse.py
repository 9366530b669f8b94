"""Models that leave work out, against themselves: what is judged, counted and refused."""

import math

import models
import numpy as np
import pytest
import torch

import layerwise as lw
from layerwise.core.errors import UserError

READ = {"samples": 3, "length": 32, "noise_floor": False}


def test_the_figures_are_those_of_the_hooked_model(llama, text):
    seen = lw.evaluate(llama, text=text, sparsify="wina", density=0.4, **READ)
    model = lw.load(llama)
    ids = _ids(llama, text)
    with lw.sparsify(model, "wina", density=0.4), torch.no_grad():
        after = model(ids).logits.double().log_softmax(dim=-1)[:, :-1]
    with torch.no_grad():
        before = model(ids).logits.double().log_softmax(dim=-1)[:, :-1]
    loss = -after.gather(2, ids[:, 1:, None]).mean()
    assert seen.text.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    kl = (before.exp() * (before - after)).sum(dim=2).mean()
    assert seen.text.kl == pytest.approx(float(kl), rel=1e-3)
    assert seen.savings.kept == pytest.approx(0.4, abs=0.02)
    assert seen.savings.flops < 0.7 * seen.savings.flops_dense
    assert seen.savings.sparse_kernel


def _ids(model, text):
    from layerwise.core.reading.text import windows

    return windows(lw.open(model).source, text, samples=3, length=32).ids


def test_what_follows_a_prompt_is_judged(llama, text):
    """Keys of 12 of 16 tokens of the prompt are thinned; the other 16 tokens are judged."""
    told = {"recent": 4, "prompt": 0.5}
    seen = lw.evaluate(llama, text=text, sparsify="think", density=0.5, skipping=told, **READ)
    assert seen.text.tokens == 3 * 15
    assert seen.savings.after == 16
    assert seen.text.kl > 1e-5
    # Of 2 blocks, 2 heads, 3 texts: 32 keys of 8 and 32 values of 8, 4 bytes each.
    assert seen.savings.cache_dense == 2 * 2 * 3 * 4 * 2 * 32 * 8
    dropped, masks = 2 * 2 * 3 * 4 * 12 * 4, 2 * 2 * 3 * 8
    assert seen.savings.cache == seen.savings.cache_dense - dropped + masks
    assert seen.savings.flops == seen.savings.flops_dense
    whole = lw.evaluate(llama, text=text, sparsify="think", density=1.0, skipping=told, **READ)
    assert whole.text.kl == pytest.approx(0, abs=1e-9)


def test_blocks_are_frozen_for_the_prompt(llama, text):
    told = {"calibration": text, "prompt": 0.5}
    seen = lw.evaluate(llama, text=text, sparsify="shortv", density=0.5, skipping=told, **READ)
    assert seen.text.tokens == 3 * 15
    assert seen.savings.kept == 0.5
    assert seen.savings.flops < 0.85 * seen.savings.flops_dense
    # The last block is what contributes least; nothing that is judged reads what it does there.
    assert seen.text.kl == pytest.approx(0, abs=1e-9)


@pytest.fixture(scope="module")
def pictures():
    draw = np.random.default_rng(0)
    return draw.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8), draw.integers(0, 4, 20)


@pytest.fixture(scope="module")
def vit():
    return models.built("vit", image_size=16, patch_size=4, num_labels=4, num_hidden_layers=3)


def test_tokens_of_pictures(vit, pictures):
    seen = lw.evaluate(
        vit, images=pictures, sparsify="zero_tprune", density=0.5, skipping={"after": [0]}
    )
    assert seen.images.accuracy_before is not None
    assert seen.images.kl > 0
    assert seen.savings.kept == pytest.approx(8 / 17)
    assert seen.savings.flops < 0.75 * seen.savings.flops_dense
    assert "forward" not in vars(vit.vit.layers[0])
    whole = lw.evaluate(vit, images=pictures, sparsify="zero_tprune", density=1.0)
    assert whole.images.kl == pytest.approx(0, abs=1e-9)


def test_inputs_of_a_model_of_pictures(vit, pictures):
    seen = lw.evaluate(vit, images=pictures, sparsify="wina", density=0.5)
    assert seen.savings.flops < 0.6 * seen.savings.flops_dense


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"sparsify": "wyna"}, "no method"),
        ({"sparsify": "wina", "tasks": "arc_easy"}, "compared with itself"),
        ({"sparsify": "zero_tprune"}, "tokens of pictures"),
        ({"sparsify": "think", "images": "x.npz"}, "models of text"),
        ({"sparsify": "shortv"}, "calibration text"),
        ({"skipping": {"first": 0.1}}, "no sparsifier"),
        ({"sparsify": "wina", "skipping": {"colour": 1}}, "colour"),
        ({"sparsify": "wina", "skipping": {"prompt": 0.5}}, "prompt says nothing"),
        ({"sparsify": "think", "skipping": {"options": {"windows": 3}}}, "no option windows"),
    ],
)
def test_refuses_before_a_model_is_loaded(how, says, llama, no_load):
    with pytest.raises(UserError, match=says):
        lw.evaluate(llama, **how)


def test_refuses_a_prompt_that_leaves_nothing(llama, text):
    with pytest.raises(UserError, match="leaves nothing"):
        lw.evaluate(llama, text=text, sparsify="think", skipping={"prompt": 0.99}, **READ)


def test_refuses_another_model(llama, no_load):
    with pytest.raises(UserError, match="compared with itself"):
        lw.evaluate(llama, against=llama, sparsify="wina")
