import pytest
import torch

from layerwise.core.errors import UserError
from layerwise.measure.alpha import alpha
from layerwise.measure.farms import farms


def by_definition(weight, rows, columns, windows):
    """-alpha of pooled windows with the tail at the median, window by window."""
    steps = [
        max(1, (side - size) // (windows - 1))
        for side, size in zip(weight.shape, (rows, columns), strict=True)
    ]
    places = {
        (min(i * steps[0], weight.shape[0] - rows), min(j * steps[1], weight.shape[1] - columns))
        for i in range(windows)
        for j in range(windows)
    }
    values = []
    for top, left in places:
        part = weight[top : top + rows, left : left + columns].double()
        values += torch.linalg.svdvals(part).square().tolist()
    values.sort()
    tail = torch.tensor(values[len(values) // 2 :]).double()
    return -1 - len(tail) / float((tail / tail[0]).log().sum())


@pytest.mark.parametrize(
    ("shape", "ratio", "rows", "columns"),
    [
        ((64, 90), 1.0, 24, 24),
        ((90, 64), 1.0, 24, 24),
        ((64, 90), 2.0, 24, 48),
        ((64, 90), 0.5, 24, 12),
        ((64, 90), 5.0, 18, 90),
        ((20, 90), 1.0, 20, 20),
    ],
)
def test_pools_the_eigenvalues_of_windows_of_one_shape(shape, ratio, rows, columns):
    weight = torch.randn(*shape)
    turned = weight if shape[1] >= shape[0] else weight.T
    found = farms(weight, window=24, ratio=ratio, windows=4, start="mid")
    assert found == pytest.approx(by_definition(turned, rows, columns, 4), rel=1e-6)


@pytest.mark.parametrize("start", ["ks", "mid", "peak"])
def test_one_window_as_large_as_the_layer_is_alpha(start):
    weight = torch.randn(48, 48)
    assert farms(weight, start=start) == pytest.approx(alpha(weight, start=start))


def test_noise_is_as_heavy_in_every_shape():
    """256 rows and 1 to 8 times as many columns."""
    noise = torch.Generator().manual_seed(0)
    layers = [torch.randn(256, 256 * n, generator=noise) for n in (1, 2, 4, 8)]
    plain = [alpha(weight, start="mid") for weight in layers]
    even = [farms(weight, window=128, windows=5, start="mid") for weight in layers]
    assert max(plain) - min(plain) >= 1
    assert max(even) - min(even) <= 0.15


@pytest.mark.parametrize("start", ["ks", "mid", "peak"])
def test_scale_and_orientation_do_not_count(start):
    weight = torch.randn(40, 90)
    expected = farms(weight, window=30, windows=3, start=start)
    for other in (weight.T, 1e-6 * weight, 1e6 * weight):
        found = farms(other, window=30, windows=3, start=start)
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_layer_without_a_tail_has_the_steepest():
    assert farms(torch.zeros(30, 40)) == farms(torch.ones(30, 40)) == -100
    assert farms(torch.randn(1, 40), windows=9) == farms(torch.randn(9, 1), ratio=3.0) == -100


@pytest.mark.parametrize("given", [{"window": 0}, {"windows": 0}, {"ratio": 0.0}])
def test_windows_that_hold_nothing_are_refused(given):
    with pytest.raises(UserError, match="asked for"):
        farms(torch.randn(8, 8), **given)
