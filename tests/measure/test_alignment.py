import pytest
import torch

from layerwise.measure.alignment import alignment


def by_definition(ours, theirs, centred):
    if centred:
        ours, theirs = (side - side.mean(dim=0) for side in (ours, theirs))
    kernels = [side.double() @ side.double().T for side in (ours, theirs)]
    total = sum(float(x * y) for x, y in zip(*(k.flatten() for k in kernels), strict=True))
    return -total / float(kernels[0].norm() * kernels[1].norm())


@pytest.mark.parametrize("centred", [False, True])
def test_is_the_cosine_of_kernels(centred):
    ours, theirs = torch.randn(30, 5) + 0.5, torch.randn(30, 8) - 0.2
    expected = by_definition(ours, theirs, centred)
    assert alignment(ours, theirs, centred=centred) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("centred", [False, True])
def test_a_rotation_or_another_scale_is_the_same_geometry(centred):
    ours = torch.randn(40, 6)
    turned = ours @ torch.linalg.qr(torch.randn(6, 6)).Q
    assert alignment(ours, turned, centred=centred) == pytest.approx(-1, abs=1e-6)
    assert alignment(ours, 1e-12 * ours, centred=centred) == pytest.approx(-1, abs=1e-6)
    assert alignment(ours, torch.randn(40, 6), centred=centred) > -0.9


def test_a_mean_hides_the_geometry_unless_it_is_taken_away():
    ours, theirs = torch.randn(200, 6) + 50, torch.randn(200, 6) + 50
    assert alignment(ours, theirs) < -0.99
    assert alignment(ours, theirs, centred=True) > -0.2


def test_blocks_that_answer_nothing():
    nothing, something = torch.zeros(9, 4), torch.randn(9, 4)
    assert alignment(nothing, nothing) == -1
    assert alignment(nothing, something) == 0
    assert alignment(something, nothing) == 0
    assert alignment(torch.ones(9, 4), something, centred=True) == 0
