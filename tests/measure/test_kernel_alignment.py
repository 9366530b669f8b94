"""Tangent kernels, against gradients taken one answer at a time."""

import pytest
import torch
from torch import nn

import layerwise as lw
from layerwise.core.running.carried import Shelf
from layerwise.core.running.runner import Runner
from layerwise.core.running.tangents import DIRECTIONS, tangents
from layerwise.measure.kernel_alignment import kernel_alignment


def test_is_the_cosine_of_kernels():
    ours, theirs = torch.randn(6, 20), torch.randn(6, 20)
    pairs = [(a, b) for a in range(6) for b in range(6)]
    k = [float(ours[a] @ ours[b]) for a, b in pairs]
    l0 = [float(theirs[a] @ theirs[b]) for a, b in pairs]
    dot = sum(x * y for x, y in zip(k, l0, strict=True))
    sizes = [sum(x * x for x in one) ** 0.5 for one in (k, l0)]
    found = kernel_alignment(ours, theirs)
    assert found == pytest.approx(-dot / (sizes[0] * sizes[1]), rel=1e-5)
    assert kernel_alignment(ours, 1e-9 * ours) == pytest.approx(-1)


def test_layers_that_nothing_depends_on():
    nothing, something = torch.zeros(5, 3), torch.randn(5, 3)
    assert kernel_alignment(nothing, nothing) == -1
    assert kernel_alignment(nothing, something) == 0


def test_gradients_are_those_of_each_window_s_answers():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    pictures = torch.randn(3, 6)
    opened = lw.open(model)
    runner = Runner(opened.source, opened.structure)
    found = tangents(runner, opened.structure.layers, pictures, Shelf())
    for place in range(DIRECTIONS):
        drawn = torch.randn(4, generator=torch.Generator().manual_seed(place)) / 2
        for number, picture in enumerate(pictures):
            answer = model(picture) @ drawn
            slopes = torch.autograd.grad(answer, [model[0].weight, model[2].weight])
            for name, slope in zip(("0", "2"), slopes, strict=True):
                row = found[name][place * 3 + number]
                assert torch.allclose(row, slope.flatten(), atol=1e-6)


def test_a_model_that_is_linear_in_its_weights_keeps_its_kernel():
    one, other = (nn.Sequential(nn.Linear(6, 5)) for _ in range(2))
    pictures = torch.randn(9, 6)
    found = lw.inspect(one, "kernel_alignment", against=other, calibration=pictures, cache=False)
    assert found.scores["kernel_alignment"]["0"] == pytest.approx(-1, abs=1e-6)


def test_a_language_model_against_itself_and_another(llama, make_llama, tmp_path):
    ids = torch.arange(4 * 16).remainder(50).reshape(4, 16)
    shown = {"calibration": ids, "samples": 4, "length": 16, "cache": False}
    same = lw.inspect(llama, "kernel_alignment", against=llama, **shown).scores
    assert all(v == pytest.approx(-1, abs=1e-5) for v in same["kernel_alignment"].values())
    half = make_llama(tmp_path / "half", dtype=torch.bfloat16)
    near = lw.inspect(llama, "kernel_alignment", against=half, **shown).scores
    assert all(-1 < v < -0.9 for v in near["kernel_alignment"].values())
