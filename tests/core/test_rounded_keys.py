"""A cache of rounded keys, and what scaling keys before their rotary embedding spares it."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import models
import pytest
import torch
from torch import Tensor, nn

from layerwise.core.activation import Activation
from layerwise.core.reading.checkpoint import Source, open_checkpoint
from layerwise.core.reading.structure import structure
from layerwise.core.rewriting.rewriting import Rewriting, Rewritten, keys_scaled, rewrite, stream_of
from layerwise.core.running.products import RoundedKeys
from layerwise.core.running.runner import Runner
from layerwise.flow.preparing import Texts
from layerwise.flow.rewriting import rewritten

ASSETS = os.environ.get("LAYERWISE_ASSETS", "")
INT4 = Activation("int4")
KEYS = Rewriting(scale_keys=True)


def test_each_key_of_each_head_is_rounded_by_itself():
    shape = (2, 3, 5, 8)
    query, key, value = (torch.randn(shape) for _ in range(3))
    rounded = torch.zeros_like(key)
    for batch, head, token in torch.cartesian_prod(*map(torch.arange, shape[:3])):
        one = key[batch, head, token]
        step = one.abs().max() / 7
        rounded[batch, head, token] = torch.round(one / step) * step
    attend = nn.functional.scaled_dot_product_attention
    with RoundedKeys(INT4):
        seen = attend(query, key, value, is_causal=True)
    torch.testing.assert_close(seen, attend(query, rounded, value, is_causal=True))


def test_a_model_s_keys_are_rounded_while_it_runs(tmp_path):
    models.make("llama", tmp_path)
    source, ids = open_checkpoint(tmp_path), models.inputs("llama")
    runner = Runner(source, structure(source))
    hidden = runner.start(ids)
    plain = runner.forward(runner.blocks[0], hidden, {})
    with RoundedKeys(INT4):
        rounded = runner.forward(runner.blocks[0], hidden, {})
    assert 1e-3 < float((plain - rounded).abs().max()) < 1


@pytest.fixture(scope="module")
def trained() -> Source:
    """The model of the card: three blocks, two heads of keys of 32 entries."""
    if not ASSETS:
        pytest.skip("LAYERWISE_ASSETS is not set")
    return open_checkpoint(Path(ASSETS) / "models/bytes-wikitext")


@pytest.fixture(scope="module")
def excess() -> Callable[[Source], float]:
    """How much perplexity on unseen bytes rises when keys are rounded to 4 bits."""
    content = (Path(ASSETS) / "text/wikitext2/test.txt").read_bytes()[: 128 * 64]
    ids = torch.tensor([*content]).reshape(128, 64)

    def found(source: Source) -> float:
        with RoundedKeys(INT4):
            rounded = _perplexity(source, ids)
        return rounded - _perplexity(source, ids)

    return found


def _perplexity(source: Source, ids: Tensor) -> float:
    runner = Runner(source, structure(source))
    hidden = runner.start(ids)
    for block in runner.blocks:
        hidden = runner.forward(block, hidden, {})
    logits = torch.cat([*runner.logits(hidden, ids, {})])[:, :-1].flatten(0, 1)
    return math.exp(nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))


def _with_outliers(source: Source, factor: float) -> Source:
    """The same function, with one rotary pair of each head of keys so many times larger."""
    stream = stream_of(source, KEYS)
    peaks: dict[str, Tensor] = {}
    for name in structure(source).layers:
        if name.endswith("k_proj"):
            peaks[name] = torch.ones(2, 16)
            peaks[name][:, 3] = 1 / factor
    return Rewritten(source, keys_scaled(source, stream, peaks), (), {}, "outliers", ())


def _scaled(source: Source) -> Source:
    calibration = Path(ASSETS) / "text/wikitext2/valid.txt"
    return rewritten(source, KEYS, Texts(calibration, samples=128, length=64))


@pytest.mark.trained
def test_claim_scaled_keys_lose_a_tenth_of_what_keys_with_outliers_lose(trained, excess):
    """FireQ, 2025 (2505.20839): a pair of W_k times 12 and of each query head's divided by 12."""
    injected = _with_outliers(trained, 12.0)
    without, with_scaling = excess(injected), excess(_scaled(injected))
    assert without > 0.5
    assert with_scaling <= 0.1 * without


@pytest.mark.trained
def test_keys_without_outliers_lose_no_more_scaled(trained, excess):
    plain, scaled = excess(trained), excess(_scaled(trained))
    assert scaled <= 1.1 * plain


@pytest.mark.trained
def test_nothing_is_lost_where_nothing_is_rounded(trained):
    ids = torch.tensor([*(Path(ASSETS) / "text/wikitext2/test.txt").read_bytes()[:1024]])
    ids = ids.reshape(-1, 64)
    turned = rewrite(_with_outliers(trained, 12.0), Rewriting("hadamard"))
    assert _perplexity(turned, ids) == pytest.approx(_perplexity(trained, ids), rel=1e-5)
