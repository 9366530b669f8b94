import math

import numpy
import pytest
import torch

from layerwise.core import catalogue
from layerwise.measure.depth_variance import depth_variance

POSITIONS = torch.arange(4).repeat(3)


def test_is_what_the_definition_says():
    inputs, outputs = torch.randn(2, 12, 8)
    kept = [n for n in range(12) if n % 4]
    before, after = inputs.double().numpy()[kept], outputs.double().numpy()[kept]
    cosines = [
        (h @ g) / numpy.linalg.norm(h) / numpy.linalg.norm(g)
        for h, g in zip(before, after, strict=True)
    ]
    expected = {
        "angle": numpy.mean([math.acos(one) / math.pi for one in cosines]),
        "influence": 1 - numpy.mean(cosines),
        "variance": before.var(),
        "after": after.var(),
        "median": sorted(before.var(axis=1))[(len(kept) - 1) // 2],
        "with_first": inputs.double().numpy().var(),
    }
    assert depth_variance(inputs, outputs, POSITIONS) == pytest.approx(expected, rel=1e-6)


def test_the_angle_of_what_is_left_alone_is_0():
    inputs = torch.randn(12, 8)
    assert depth_variance(inputs, 3 * inputs, POSITIONS)["angle"] == pytest.approx(0, abs=1e-6)
    assert depth_variance(inputs, -inputs, POSITIONS)["angle"] == pytest.approx(1, abs=1e-6)
    assert depth_variance(inputs, 0 * inputs, POSITIONS)["angle"] == pytest.approx(0.5)


def test_across_blocks_it_says_how_the_variance_grows():
    across = catalogue.get("measure/depth_variance").across
    told = across([{"after": 2.0 * math.exp(0.5 * number)} for number in range(6)])
    assert told == {"growth": pytest.approx(math.exp(2.5)), "slope": pytest.approx(0.5)}
