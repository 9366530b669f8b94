"""A cache that keeps some channels of old keys."""

import models
import pytest
import torch

import layerwise as lw

SIZE = 8
TOLD = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def llama():
    return models.built("llama")


@pytest.fixture
def ids():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, models.VOCAB, (2, 24), generator=generator)


def prefilled(model, ids, **how):
    with lw.sparsify(model, "think", **how) as sparse:
        cache = sparse.cache()
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
        return sparse, cache


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "phi"])
def test_all_channels_kept_generate_the_same(kind):
    model, ids = models.built(kind), models.inputs(kind)
    wanted = model.generate(ids, **TOLD)
    with lw.sparsify(model, "think", density=1.0, recent=4) as sparse:
        assert torch.equal(model.generate(ids, past_key_values=sparse.cache(), **TOLD), wanted)


def test_what_is_held_is_smaller(llama, ids):
    """Two blocks, two texts, two heads of keys: 20 old tokens with 4 channels of 8, 4 with all."""
    _, cache = prefilled(llama, ids, density=0.5, recent=4)
    for layer in cache.layers:
        assert layer.thin.shape == (2, 2, 20, 4)
        assert layer.keys.shape == (2, 2, 4, SIZE)
        assert layer.values.shape == (2, 2, 24, SIZE)
    keys = 20 * 4 + 4 * SIZE
    mask = SIZE  # bytes a head
    assert cache.held() == 2 * 2 * 2 * (4 * (keys + 24 * SIZE) + mask)
    whole = 2 * 2 * 2 * 4 * 2 * 24 * SIZE
    assert cache.held() < 0.85 * whole


def test_attention_sees_only_what_is_kept(llama, ids):
    """Keys with zeros for dropped channels, by hand, give the logits that the cache gives."""
    _, cache = prefilled(llama, ids, density=0.5, recent=4)
    from transformers import DynamicCache

    plain = DynamicCache(config=llama.config)
    more = torch.full((2, 1), 7)
    with torch.no_grad():
        llama(ids, past_key_values=plain, use_cache=True)
        for layer, thin in zip(plain.layers, cache.layers, strict=True):
            gone = ~thin.kept[:, :, None].expand(-1, -1, 20, -1)
            layer.keys[:, :, :20] = layer.keys[:, :, :20].masked_fill(gone, 0.0)
        wanted = llama(more, past_key_values=plain, use_cache=True).logits
        found = llama(more, past_key_values=cache, use_cache=True).logits
    assert torch.allclose(found, wanted, atol=1e-5)


def test_new_tokens_are_kept_whole(llama, ids):
    with lw.sparsify(llama, "think", density=0.5, recent=4) as sparse:
        cache = sparse.cache()
        llama.generate(ids, past_key_values=cache, **TOLD)
    # The last token that is made is not read.
    assert cache.layers[0].keys.shape == (2, 2, 4 + 5, SIZE)
    assert cache.get_seq_length() == 29


def test_a_prompt_of_recent_tokens_is_left_whole(llama, ids):
    wanted = llama.generate(ids, **TOLD)
    with lw.sparsify(llama, "think", density=0.25, recent=24) as sparse:
        cache = sparse.cache()
        assert torch.equal(llama.generate(ids, past_key_values=cache, **TOLD), wanted)
    assert all(layer.thin is None for layer in cache.layers)


def test_beams_take_their_cache_along(llama, ids):
    """Texts that change places in a batch take what was thinned along."""
    told = {**TOLD, "num_beams": 3}
    with lw.sparsify(llama, "think", density=1.0, recent=4) as sparse:
        found = llama.generate(ids, past_key_values=sparse.cache(), **told)
    assert torch.equal(found, llama.generate(ids, **told))


def test_padding_says_nothing(llama, ids):
    """A padded text drops the channels that it drops alone."""
    _, alone = prefilled(llama, ids[:1], density=0.5, recent=4)
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), ids[:1]], dim=1)
    mask = torch.cat([torch.zeros(1, 6), torch.ones(1, 24)], dim=1).long()
    with lw.sparsify(llama, "think", density=0.5, recent=4) as sparse, torch.no_grad():
        cache = sparse.cache()
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        llama(padded, attention_mask=mask, position_ids=places, past_key_values=cache)
    for one, other in zip(alone.layers, cache.layers, strict=True):
        assert torch.equal(one.kept, other.kept)


def test_blocks_with_a_window_are_left_whole(ids):
    model = models.built("gemma3_text")
    sparse, cache = prefilled(model, ids, density=0.5, recent=4)
    assert not hasattr(cache.layers[0], "thin")
    assert cache.layers[1].thin is not None
    assert sparse.tally.kept < sparse.tally.offered


def test_the_model_is_given_back(llama, ids):
    before = llama.generate(ids, **TOLD)
    sparse = lw.sparsify(llama, "think", density=0.25, recent=4)
    sparse.remove()
    assert "forward" not in vars(llama)
    assert torch.equal(llama.generate(ids, **TOLD), before)
