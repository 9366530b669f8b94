"""Adapters inside a mask, against their definitions."""

import pytest
import torch

from layerwise.core.errors import UserError
from layerwise.recover.masklora import masklora
from layerwise.recover.scalelora import scalelora


def pruned() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 10, generator=draw)
    kept = torch.rand(6, 10, generator=draw) < 0.5
    return weight * kept, kept


def moved(adapter, by=0.1):
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensors in adapter.parameters().values():
            for tensor in tensors:
                tensor.add_(by * torch.randn(tensor.shape, generator=draw))
        return adapter.weight()


def test_masklora_is_a_low_rank_change_inside_the_mask():
    weight, kept = pruned()
    adapter = masklora(weight, kept, columns=3, alpha=6.0)
    found = moved(adapter)
    (tensors,) = adapter.parameters().values()
    left, right = (tensor.detach() for tensor in tensors)
    assert (left.shape, right.shape) == ((6, 3), (3, 10))
    for i in range(6):
        for j in range(10):
            change = 6.0 / 3 * sum(float(left[i, k] * right[k, j]) for k in range(3))
            wanted = float(weight[i, j]) + (change if kept[i, j] else 0.0)
            assert float(found[i, j]) == pytest.approx(wanted, abs=1e-6)


def test_without_a_mask_it_is_lora():
    weight, kept = pruned()
    full = moved(masklora(weight, torch.ones_like(kept), columns=2)) - weight
    assert torch.linalg.matrix_rank(full) == 2


def test_scalelora_multiplies_what_stays():
    weight, kept = pruned()
    adapter = scalelora(weight, kept, columns=4)
    (tensors,) = adapter.parameters().values()
    assert torch.allclose(tensors[0] @ tensors[1], torch.ones(6, 10), atol=1e-6)
    found = moved(adapter, by=0.05)
    wanted = weight * (tensors[0] @ tensors[1]).detach()
    assert torch.allclose(found, wanted, atol=1e-6)
    assert not torch.allclose(found, weight, atol=1e-2)


def test_columns_of_scalelora_do_not_stay_alike():
    """Gradients of columns that begin alike are alike, and they would stay one column."""
    weight, kept = pruned()
    adapter = scalelora(weight, kept, columns=4)
    (tensors,) = adapter.parameters().values()
    (adapter.weight() * torch.randn(6, 10)).sum().backward()
    gradients = tensors[0].grad
    assert gradients is not None
    assert not torch.allclose(gradients[:, 0], gradients[:, 3])


@pytest.mark.parametrize("method", [masklora, scalelora])
def test_factors_have_a_column(method):
    with pytest.raises(UserError, match="columns is 0"):
        method(*pruned(), columns=0)
