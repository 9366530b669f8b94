import math

import numpy
import pytest
import torch

from layerwise.core import catalogue
from layerwise.measure.feature_weighting import feature_weighting

across = catalogue.get("measure/feature_weighting").across


def test_is_what_the_definition_says():
    labels = torch.arange(90) % 3
    states = torch.randn(90, 7) + torch.randn(3, 7)[labels]
    data = states.double().numpy()
    data = data - data.mean(axis=0)
    shares = numpy.linalg.eigvalsh(data.T @ data)
    shares = shares / shares.sum()
    expected = {
        "effective_rank": math.exp(-sum(p * math.log(p) for p in shares)),
        "participation": 1 / sum(p**2 for p in shares),
        "top": max(shares),
    }
    for one in range(3):
        own = (labels == one).numpy()
        apart = data[own].mean(axis=0) - data[~own].mean(axis=0)
        expected[f"weight_{one}"] = numpy.linalg.norm(apart) / math.sqrt(data.var(axis=0).mean())
    assert feature_weighting(states, labels) == pytest.approx(expected, rel=1e-9)


def test_equal_states_have_no_rank_and_show_no_class():
    found = feature_weighting(torch.full((40, 5), 0.3), torch.arange(40) % 2)
    assert set(found.values()) == {0.0}


def test_the_slope_is_that_of_the_strongest_class_by_the_weakest():
    records = [
        {"effective_rank": math.exp(-n), "weight_0": 2.0, "weight_1": math.exp(n / 2)}
        for n in range(5)
    ]
    assert across(records) == pytest.approx({"slope": 0.5, "rank_slope": -1.0})


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_second_linear_layer_weighs_features_twice_as_unequally(seed):
    """Two linear layers balance under weight decay; settings as on the method's card."""
    draw = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(32, 2, generator=draw))[0]  # (32, 2)
    target = torch.eye(16, 2) * torch.tensor([1.0, 0.3])
    first = 0.1 * torch.randn(16, 32, generator=draw)
    second = 0.1 * torch.randn(16, 16, generator=draw)
    for _ in range(6000):
        # Mean squared error of 16 outputs, over two independent features of variance 1.
        error = second @ (first @ directions) - target
        above = 2 / 16 * error @ directions.T
        steps = second.T @ above + 1e-3 * first, above @ first.T + 1e-3 * second
        first, second = first - 0.2 * steps[0], second - 0.2 * steps[1]
    hidden = first @ directions
    final = second @ hidden
    ratios = [float((one[:, 0].norm() / one[:, 1].norm()).log()) for one in (hidden, final)]
    assert ratios[0] > 0.3
    assert ratios[1] / ratios[0] == pytest.approx(2, abs=0.2)
