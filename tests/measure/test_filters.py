import math

import pytest
import torch
from resnet import pictures
from torch import nn

from layerwise.core.errors import UserError
from layerwise.measure.filter_orthogonality import filter_orthogonality
from layerwise.measure.filter_sparsity import filter_sparsity
from layerwise.measure.filters import filters


def entropy(rows):
    """From singular values, one at a time."""
    centred = rows.double() - rows.double().mean(dim=0)
    variances = [float(s) ** 2 / (len(rows) - 1) for s in torch.linalg.svdvals(centred)]
    shares = [v / sum(variances) for v in variances]
    return -sum(p * math.log10(p) for p in shares if p > 0)


def noise_edge(count):
    return 1.2618047 / (1 + math.exp(-0.88767525 * (math.log2(count) - 2.30436435))) - 0.31050834


@pytest.mark.parametrize("kernel", [(3, 3), (1, 5), (5, 5), (1, 1)])
def test_is_the_entropy_of_the_variance_over_principal_patterns(kernel):
    weight = torch.randn(12, 7, *kernel) * torch.rand(kernel) + 0.3
    entries = kernel[0] * kernel[1]
    expected = entropy(weight.reshape(-1, entries))
    assert filters(weight.flatten(1), entries=entries) == pytest.approx(expected)


@pytest.mark.parametrize("count", [64, 256, 1024, 4096])
def test_noise_lies_just_above_its_lower_edge(count):
    noise = torch.Generator().manual_seed(0)
    found = [filters(torch.randn(count, 9, generator=noise)) for _ in range(5)]
    assert 0 <= sum(found) / 5 - noise_edge(count) <= 0.02


def test_few_patterns_have_a_low_entropy():
    """Three patterns with 5% noise, and one."""
    noise = torch.Generator().manual_seed(0)
    patterns = torch.randn(3, 9, generator=noise)
    chosen = patterns[torch.randint(3, (1024,), generator=noise)]
    disturbed = chosen + 0.05 * torch.randn(1024, 9, generator=noise)
    assert filters(disturbed.reshape(32, -1)) <= 0.55
    one = torch.randn(1024, 1, generator=noise) * patterns[:1]
    assert filters(one.reshape(32, -1)) == pytest.approx(0, abs=1e-5)


def test_scale_and_the_basis_of_the_entries_do_not_count():
    weight = torch.randn(16, 8, 9).double() * torch.rand(9)
    turn = torch.linalg.qr(torch.randn(9, 9).double()).Q
    expected = filters(weight.flatten(1))
    for other in (1e-20 * weight, 1e20 * weight, weight @ turn):
        assert filters(other.flatten(1)) == pytest.approx(expected)


def test_clean_leaves_out_sparse_filters():
    weight = torch.randn(20, 8, 9)
    weight[3:9, :5] *= 1e-4
    rows = weight.reshape(-1, 9)
    kept = rows[rows.abs().amax(dim=1) >= 0.01 * rows.abs().max()]
    assert filters(weight.flatten(1), clean=True) == pytest.approx(entropy(kept))
    assert filter_sparsity(weight.flatten(1)) == pytest.approx(-(len(rows) - len(kept)) / 160)


def test_a_huge_weight_is_left_out_by_a_quantile():
    weight = torch.randn(20, 72)
    weight[0, 0] = 1e6
    assert filter_sparsity(weight) == pytest.approx(-159 / 160)
    assert filter_sparsity(weight, quantile=0.99) == 0


def test_relative_is_a_share_of_noise():
    weight = torch.randn(8, 36) * torch.rand(36)
    assert filters(weight, relative=True) == pytest.approx(filters(weight) / noise_edge(32))
    for given, entries in ((weight[:3], 9), (weight, 4)):
        with pytest.raises(UserError, match="not known"):
            filters(given, entries=entries, relative=True)


def test_what_has_no_filters_or_no_variance():
    assert filters(torch.zeros(4, 18)) == filters(torch.full((4, 18), 0.1)) == 0
    assert filters(torch.zeros(4, 18), clean=True, relative=True) == 0
    assert filters(torch.randn(4, 10)) == filters(torch.randn(1, 9)) == 0
    assert filter_sparsity(torch.zeros(4, 18)) == -1
    assert filter_sparsity(torch.randn(4, 10)) == 0


@pytest.mark.parametrize("given", [{"share": 0.0}, {"quantile": 1.5}, {"entries": 0}])
def test_what_is_no_filter_or_no_share_is_refused(given):
    with pytest.raises(UserError, match="asked for"):
        filter_sparsity(torch.randn(4, 9), **given)


def test_orthogonality_is_one_less_the_mean_cosine():
    weight = torch.randn(9, 14)
    weight[[2, 6]] = 0
    total = 0.0
    for a in range(9):
        for b in range(9):
            if a != b:
                sizes = float(weight[a].norm() * weight[b].norm())
                total += abs(float(weight[a] @ weight[b])) / sizes if sizes else 1
    assert filter_orthogonality(weight) == pytest.approx(1 - total / 72)


def test_orthogonality_at_its_ends():
    turned = torch.linalg.qr(torch.randn(12, 12)).Q
    assert filter_orthogonality(turned[:5]) == pytest.approx(1, abs=1e-6)
    assert filter_orthogonality(torch.randn(5, 1)) == pytest.approx(0)
    assert filter_orthogonality(torch.zeros(5, 3)) == 0
    assert filter_orthogonality(torch.randn(1, 3)) == 1
    assert filter_orthogonality(1e-30 * turned) == pytest.approx(1, abs=1e-6)


@pytest.mark.trained
def test_training_leaves_filters_further_from_noise():
    """ResNet-20 of the assets against noise of the same shapes: a drop of 0.02 in the mean."""
    noise = torch.Generator().manual_seed(0)
    convolutions = [
        part.weight
        for part in pictures().net.modules()
        if isinstance(part, nn.Conv2d) and part.weight.shape[2:] == (3, 3)
    ]
    trained = [filters(weight.flatten(1), relative=True) for weight in convolutions]
    fresh = [
        filters(torch.randn(weight.shape, generator=noise).flatten(1), relative=True)
        for weight in convolutions
    ]
    assert len(convolutions) >= 19
    assert sum(fresh) / len(fresh) - sum(trained) / len(trained) >= 0.02
