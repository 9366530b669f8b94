import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from layerwise.core.errors import UserError
from layerwise.measure.filter_shift import filter_shift

ASSETS = "LAYERWISE_ASSETS"


def by_definition(weight, base, bins):
    """The card's steps, by numpy and sklearn."""
    sides = [side.double().reshape(-1, 9).numpy() for side in (weight, base)]
    sides = [side / np.abs(side).max(axis=1, keepdims=True) for side in sides]
    fitted = PCA(9).fit(np.concatenate(sides))
    found = [fitted.transform(side) for side in sides]
    total = 0.0
    for axis, share in enumerate(fitted.explained_variance_ratio_):
        both = np.concatenate([side[:, axis] for side in found])
        shares = []
        for side in found:
            counted, _ = np.histogram(side[:, axis], bins, (both.min(), both.max()))
            filled = np.maximum(counted / len(side), np.finfo(np.float32).eps)
            shares.append(filled / filled.sum())
        p, q = shares
        total += share * float((p * np.log(p / q)).sum() + (q * np.log(q / p)).sum())
    return total


def test_is_the_divergence_of_histograms_along_principal_axes():
    weight, base = torch.randn(64, 9 * 32), torch.rand(64, 9 * 32) - 0.3
    for bins in (10, 70):
        found = filter_shift(weight, base, bins=bins)
        assert found == pytest.approx(by_definition(weight, base, bins), rel=1e-3)


def test_is_symmetric_and_0_for_the_same_filters_in_any_order():
    weight, base = torch.randn(16, 90), torch.rand(16, 90)
    assert filter_shift(weight, weight) == 0
    moved = weight.reshape(-1, 9)[torch.randperm(160)].reshape(16, 90)
    assert filter_shift(moved, weight) == pytest.approx(0, abs=1e-9)
    assert filter_shift(weight, base) == pytest.approx(filter_shift(base, weight), rel=1e-9)
    assert filter_shift(5 * weight, weight) == pytest.approx(0, abs=1e-9)


def test_layers_without_filters_have_no_shift():
    assert filter_shift(torch.randn(8, 10), torch.randn(8, 10)) == 0
    assert filter_shift(torch.zeros(8, 18), torch.zeros(8, 18)) == 0
    assert filter_shift(torch.ones(8, 18), torch.ones(8, 18)) == pytest.approx(0)


def test_what_makes_no_histogram_is_refused():
    with pytest.raises(UserError, match="0 bins"):
        filter_shift(torch.randn(8, 9), torch.randn(8, 9), bins=0)
    with pytest.raises(UserError, match="entries"):
        filter_shift(torch.randn(8, 9), torch.randn(8, 9), entries=0)


@pytest.mark.parametrize(("count", "apart"), [(100, 4.3), (1000, 0.22), (10_000, 0.018)])
def test_few_filters_are_apart_by_empty_bins(count, apart):
    assert filter_shift(torch.randn(count, 9), torch.randn(count, 9)) == pytest.approx(
        apart, rel=0.2
    )


@pytest.mark.xfail(
    reason="does not hold: 6 of 19, those of 2,048 filters and more; it is 1.0 to 3.6 in others",
    strict=True,
)
def test_training_moves_filters_further_than_another_draw_does():
    """The card's claim on ResNet-20: in 80% of the layers, 5 times as far."""
    if not os.environ.get(ASSETS):
        pytest.skip(f"{ASSETS} is not set")
    folder = Path(os.environ[ASSETS]) / "models/cifar10-resnet"
    sys.path.insert(0, str(folder))
    import cifar_resnet

    model = cifar_resnet.load(20, str(folder / "resnet20.safetensors"))
    weights = [p.detach() for p in model.parameters() if p.dim() == 4 and p.shape[-1] == 3]
    ratios = []
    for weight in weights:
        first, second = (torch.nn.init.kaiming_normal_(torch.empty_like(weight)) for _ in range(2))
        trained, again = (filter_shift(w.flatten(1), first.flatten(1)) for w in (weight, second))
        ratios.append(trained / again)
    assert sum(ratio > 5 for ratio in ratios) >= 0.8 * len(ratios)
