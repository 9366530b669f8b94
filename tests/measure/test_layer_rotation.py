import math
import os
import statistics
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import layerwise as lw
from layerwise.measure.rotation import rotation

ASSETS = "LAYERWISE_ASSETS"
RATES = (3**-7, 3**-5, 3**-3)


def by_definition(weight, base):
    a, b = weight.flatten().tolist(), base.flatten().tolist()
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return 1 - dot / (math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b)))


def test_is_the_cosine_distance():
    weight, base = torch.randn(7, 9), torch.randn(7, 9)
    assert rotation(weight, base) == pytest.approx(by_definition(weight, base), rel=1e-6)
    assert rotation(base, weight) == pytest.approx(rotation(weight, base), rel=1e-9)


def test_goes_from_0_to_2_whatever_the_lengths():
    weight = torch.randn(5, 8)
    assert rotation(weight, weight) == 0
    assert rotation(3 * weight, 1e-20 * weight) == pytest.approx(0, abs=1e-12)
    assert rotation(weight, -weight) == pytest.approx(2)
    assert rotation(torch.eye(4), torch.eye(4).roll(1, 0)) == pytest.approx(1)


def test_keeps_the_digits_of_a_small_angle():
    weight = torch.zeros(1, 2, dtype=torch.float64)
    weight[0, 0] = 1.0
    turned = weight.clone()
    turned[0, 1] = 1e-7
    assert rotation(turned, weight) == pytest.approx(0.5e-14, rel=1e-6)


def test_a_layer_of_zeros_is_at_right_angles_to_others():
    weight = torch.randn(3, 4)
    assert rotation(weight, torch.zeros(3, 4)) == 1
    assert rotation(torch.zeros(3, 4), weight) == 1
    assert rotation(torch.zeros(3, 4), torch.zeros(3, 4)) == 0


def test_a_step_on_the_sphere_turns_a_layer_by_its_rate():
    weight, slope = torch.randn(6, 6).double(), torch.randn(6, 6).double()
    stepped = layca(weight, slope, 0.1)
    assert float(stepped.norm()) == pytest.approx(float(weight.norm()), rel=1e-9)
    angle = math.acos(1 - rotation(stepped, weight))
    assert math.tan(angle) == pytest.approx(0.1, rel=1e-6)


def layca(weight, slope, rate):
    """A step of the paper's optimizer: along the sphere, by an angle whose tangent is the rate."""
    size = weight.norm()
    step = slope - (slope * weight).sum() * weight / size**2
    moved = weight - rate * step * size / step.norm().clamp(min=1e-12)
    return moved * size / moved.norm()


def test_what_turned_further_generalizes_better():
    """The paper's own claim, on digits: test accuracy and rotation rise together."""
    found = [_trained(rate) for rate in RATES]
    turned, right = zip(*found, strict=True)
    assert list(turned) == sorted(turned)
    assert list(right) == sorted(right)
    assert right[-1] >= right[0] + 0.05


@pytest.mark.parametrize("tuned", ["shakespeare", "wikitext"])
def test_fine_tuning_hardly_turns_a_real_model(tuned):
    """What was fine-tuned is near its start; another draw of its size is at right angles to it."""
    if not os.environ.get(ASSETS):
        pytest.skip(f"{ASSETS} is not set")
    models = Path(os.environ[ASSETS]) / "models"
    base, made = models / "stories260k", models / f"stories260k-ft-{tuned}"
    found = lw.inspect(made, ["rotation", "displacement"], against=base, cache=False).scores
    assert all(0 < angle < 0.01 for angle in found["rotation"].values())
    assert all(0 < way < 0.15 for way in found["displacement"].values())
    source = lw.open(base)
    for layer in source.structure.layers.values():
        weight = layer.read(source.source).float()
        assert abs(rotation(torch.randn(weight.shape), weight) - 1) < 0.15


def _trained(rate):
    """Mean rotation of the layers after training, and accuracy on what was not seen."""
    pixels, classes = load_digits(return_X_y=True)
    pictures, labels = torch.tensor(pixels / 16).float(), torch.tensor(classes)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    layers = [part for part in net if isinstance(part, nn.Linear)]
    start = [layer.weight.detach().clone() for layer in layers]
    for _ in range(40):
        for part in torch.randperm(1200).split(128):
            net.zero_grad()
            functional.cross_entropy(net(pictures[part]), labels[part]).backward()
            for layer in layers:
                layer.weight.data = layca(layer.weight.data, layer.weight.grad, rate)
    scores = [rotation(one.weight.detach(), b) for one, b in zip(layers, start, strict=True)]
    with torch.no_grad():
        right = net(pictures[1200:]).argmax(dim=1) == labels[1200:]
    return statistics.fmean(scores), float(right.float().mean())
