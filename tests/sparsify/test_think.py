import pytest
import torch

from layerwise.core.errors import UserError
from layerwise.sparsify.key_norm import key_norm
from layerwise.sparsify.think import think


def head(spread=0.8, tokens=512, asking=128, size=64):
    """Queries and keys whose channels are of unequal size, each in its own way."""
    queries = torch.randn(1, 1, asking, size) * (spread * torch.randn(size)).exp()
    keys = torch.randn(1, 1, tokens, size) * (spread * torch.randn(size)).exp()
    return queries, keys


def logit_error(queries, keys, kept):
    whole = queries @ keys.transpose(2, 3)
    lost = (queries * ~kept[:, :, None]) @ keys.transpose(2, 3)
    return float(lost.square().sum() / whole.square().sum())


def test_is_the_definition():
    queries, keys = torch.randn(2, 4, 40, 6), torch.randn(2, 2, 50, 6)
    kept = think(queries, keys, density=0.5, window=8)
    for text in range(2):
        for group in range(2):
            asked = queries[text, 2 * group : 2 * group + 2, -8:]
            norms = [
                float(asked[:, :, d].square().mean() * keys[text, group, :, d].square().mean())
                for d in range(6)
            ]
            best = sorted(range(6), key=lambda d: -norms[d])[:3]
            assert kept[text, group].nonzero()[:, 0].tolist() == sorted(best)


def test_the_card_s_claim_of_one_head():
    queries, keys = head()
    ours = logit_error(queries, keys, think(queries, keys, density=0.5))
    by_keys = logit_error(queries, keys, key_norm(keys, density=0.5))
    draws = []
    for _ in range(10):
        kept = torch.zeros(1, 1, 64, dtype=torch.bool)
        kept[..., torch.randperm(64)[:32]] = True
        draws.append(logit_error(queries, keys, kept))
    assert ours <= 0.5 * by_keys
    assert ours <= 0.2 * sum(draws) / len(draws)


def test_a_channel_of_zeros_goes_first_and_costs_nothing():
    queries, keys = head(spread=0.2)
    keys[..., 5] = 0
    kept = think(queries, keys, density=63 / 64)
    assert kept[0, 0].nonzero()[:, 0].tolist() == [d for d in range(64) if d != 5]
    assert logit_error(queries, keys, kept) == 0


def test_refuses_heads_that_do_not_share_keys_evenly():
    with pytest.raises(UserError, match="3 heads"):
        think(torch.randn(1, 3, 4, 8), torch.randn(1, 2, 4, 8), density=0.5)
    with pytest.raises(UserError, match="window of 0"):
        think(torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), density=0.5, window=0)
