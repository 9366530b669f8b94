import pytest
import torch

from layerwise.sparsify._keep import count, keep_highest


@pytest.mark.parametrize("kept", [1, 3, 6, 7])
def test_selecting_is_sorting(kept):
    """Of equal scores the earlier stay, infinite ones too."""
    scores = torch.randint(0, 4, (50, 2, 7)).float()
    scores[::5, :, 2] = torch.inf
    scores[::7, :, 3] = -torch.inf
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :kept]
    wanted = torch.zeros(scores.shape, dtype=torch.bool).scatter(-1, order, True)
    assert torch.equal(keep_highest(scores, kept), wanted)


def test_counts():
    assert [count(density, 10) for density in (0.01, 0.24, 0.26, 1.0)] == [1, 2, 3, 10]
