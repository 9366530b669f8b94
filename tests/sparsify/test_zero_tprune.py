import pytest
import torch

from layerwise.core.errors import UserError
from layerwise.sparsify.attended import attended
from layerwise.sparsify.zero_tprune import _ranked, zero_tprune


def graph(batch=1, heads=2, tokens=12, sharp=1.0):
    return (sharp * torch.randn(batch, heads, tokens, tokens)).softmax(dim=-1)


def test_the_ranking_is_the_left_eigenvector():
    attention = graph(tokens=20)
    scores = _ranked(attention, torch.full((1, 2, 20), 1 / 20), 50)
    for head in range(2):
        values, vectors = torch.linalg.eig(attention[0, head].double().T)
        vector = vectors[:, values.real.argmax()].real
        wanted = (vector / vector.sum()).float()
        assert scores[0, head].tolist() == pytest.approx(wanted.tolist(), abs=1e-4)


def test_tokens_that_attend_evenly_are_equal():
    scores = _ranked(torch.full((1, 1, 8, 8), 1 / 8), torch.full((1, 1, 8), 1 / 8), 10)
    assert scores.flatten().tolist() == pytest.approx([1 / 8] * 8)


def test_tokens_in_another_order_are_kept_likewise():
    attention, keys = graph(sharp=2.0), torch.randn(1, 2, 12, 5)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(11)])
    moved = attention[:, :, order][:, :, :, order]
    kept = zero_tprune(attention, keys, density=0.5)
    assert torch.equal(zero_tprune(moved, keys[:, :, order], density=0.5), kept[:, order])


def test_of_twins_one_goes_first():
    """Three pairs of tokens with the same keys: three that go for being alike are one of each."""
    tokens = 13
    keys = torch.randn(1, 1, tokens, 16)
    attention = torch.full((1, 1, tokens, tokens), 0.5)
    twins = [(1, 7), (2, 9), (4, 12)]
    for one, other in twins:
        keys[:, :, other] = keys[:, :, one]
    # The first of each pair is among the more important half, the other is not.
    attention[..., [0, 1, 2, 3, 4, 5, 6]] += 1.0
    attention = attention / attention.sum(dim=-1, keepdim=True)
    kept = zero_tprune(attention, keys, density=10 / 13, alike=1.0)
    assert (~kept[0]).nonzero()[:, 0].tolist() == [7, 9, 12]


def test_what_must_stay_stays_however_little_is_attended_to():
    attention = graph()
    attention[..., 0] = 0
    attention = attention / attention.sum(dim=-1, keepdim=True)
    for kept in (
        zero_tprune(attention, torch.randn(1, 2, 12, 4), density=0.1),
        attended(attention, density=0.1),
    ):
        assert kept[0].nonzero()[:, 0].tolist() == [0]


def test_a_head_that_says_nothing_is_not_heard():
    """One head attends evenly, the other to the last tokens: these are kept."""
    tokens = 10
    even = torch.full((tokens, tokens), 1 / tokens)
    sharp = torch.full((tokens, tokens), 0.05)
    sharp[:, 6:] = 0.3
    attention = torch.stack([even, sharp / sharp.sum(dim=-1, keepdim=True)])[None]
    kept = zero_tprune(attention, torch.randn(1, 2, tokens, 3), density=0.5, alike=0.0)
    assert kept[0].nonzero()[:, 0].tolist() == [0, 6, 7, 8, 9]


@pytest.mark.parametrize("wrong", [{"alike": 1.5}, {"alike": -0.1}, {"steps": 0}])
def test_refuses_nonsense(wrong):
    with pytest.raises(UserError):
        zero_tprune(graph(), torch.randn(1, 2, 12, 4), density=0.5, **wrong)
