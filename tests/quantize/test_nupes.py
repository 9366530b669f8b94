"""NUPES against its definition, and what its shifts and exponents are free to do."""

import math
import os

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.learning import OutputError, learn
from layerwise.core.plan import LayerPlan
from layerwise.core.results import Quantized
from layerwise.quantize.nupes import Nupes, nupes
from layerwise.quantize.powerquant import powerquant

ASSETS = os.environ.get("LAYERWISE_ASSETS", "")
NOISE = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(24, 64, generator=NOISE)
INPUTS = torch.randn(500, 64, generator=NOISE) @ torch.randn(64, 64, generator=NOISE)
GRAM = INPUTS.T @ INPUTS / len(INPUTS)
PROBLEM = OutputError(WEIGHT, GRAM)
QUICK = {"text": "builtin", "text_samples": 4, "length": 64, "samples": 16, "noise_floor": False}


def disturbed(layer, growth=-0.1):
    """The same layer, with another exponent and shifts of about a code."""
    with torch.no_grad():
        layer.growth.fill_(growth)
        layer.shift.copy_(torch.randn(layer.shift.shape, generator=torch.manual_seed(1)))
    return layer


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 0), (3, 20), (4, 16), (8, 64)])
def test_no_steps_are_powerquant(bits, group, symmetric):
    grid = {"bits": bits, "group": group, "symmetric": symmetric}
    made, start = nupes(WEIGHT, GRAM, steps=0, **grid), powerquant(WEIGHT, **grid)
    assert torch.equal(made.codes, start.codes)
    assert torch.equal(made.dequantize(), start.dequantize())
    assert made.notes == start.notes


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_matches_the_equations(bits):
    layer = disturbed(Nupes(WEIGHT, bits=bits, group=20))
    restored = layer.coded().dequantize()
    most, a = 2 ** (bits - 1) - 1, layer.start * math.exp(-0.1)
    shift = layer.shift.detach()
    for row in range(24):
        for column in range(64):
            group, place = divmod(column, 20)
            s, w = float(layer.scale[row, group]), float(WEIGHT[row, column])
            v = float(shift[row, group, place])
            q = round(math.copysign(most * (abs(w) / s) ** a, w) + v)
            q = min(max(q, -most), most)
            theirs = math.copysign(s * (abs(q) / most) ** (1 / a), q)
            assert float(restored[row, column]) == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_the_gradients_are_those_of_the_definition():
    layer = disturbed(Nupes(WEIGHT, bits=3, group=64))
    given = torch.randn(24, 64, generator=NOISE)
    with torch.enable_grad():
        (layer.weight() * given).sum().backward()
    a = torch.tensor(layer.exponent, dtype=torch.float64)
    points = torch.arange(-3, 4).double()
    points = points.sign() * (points.abs() / 3) ** (1 / a)
    w, scale = WEIGHT.double(), layer.scale.double()
    steps = w.sign() * 3 * (w.abs() / scale) ** a + layer.shift.detach()[:, 0]
    inside = steps.round().abs() <= 3
    assert not bool(inside.all())
    codes = steps.clamp(-3, 3).round().long() + 3
    up, down = points[(codes + 1).clamp(max=6)], points[(codes - 1).clamp(min=0)]
    slope = (up - down) / ((codes < 6).double() + (codes > 0).double()) * inside * scale
    torch.testing.assert_close(layer.shift.grad[:, 0], (given * slope).float())
    # By the exponent's logarithm: what its points do, and what its steps do.
    small = 1e-6
    moved_points = (points.sign() * points.abs() ** math.exp(-small) - points) / small
    moved_steps = w.sign() * 3 * (w.abs() / scale) ** (a * math.exp(small))
    moved_steps = (moved_steps - w.sign() * 3 * (w.abs() / scale) ** a) / small
    expected = (given * (moved_points[codes] * scale + slope * moved_steps)).sum()
    torch.testing.assert_close(layer.growth.grad, expected, rtol=1e-3, atol=1e-3)


def test_weights_at_zero_can_leave_it():
    layer = Nupes(WEIGHT, bits=3, group=64)
    assert layer.exponent < 1
    at_zero = layer.coded().dequantize() == 0
    with torch.enable_grad():
        PROBLEM.loss([layer.weight()], 0).backward()
    assert bool((layer.shift.grad[:, 0][at_zero] != 0).all())


def test_codes_go_anywhere_but_zeros_stay():
    pruned = WEIGHT.where(WEIGHT.abs() > 0.7, 0.0)
    layer = Nupes(pruned, bits=3, group=20)
    with torch.no_grad():
        layer.shift.fill_(-100.0)
    restored = layer.coded().dequantize()
    assert not restored[pruned == 0].any()
    assert bool((restored[pruned != 0] < 0).all())
    assert int(layer.coded().codes.min()) == 1


def test_no_shift_leads_past_the_ends():
    layer = disturbed(Nupes(WEIGHT, bits=2, group=64))
    before = layer.coded().codes
    layer.settle()
    assert torch.equal(layer.coded().codes, before)
    with torch.enable_grad():
        PROBLEM.loss([layer.weight()], 0).backward()
    assert bool((layer.shift.grad != 0).all())


def test_the_exponent_stays_in_its_range():
    made = nupes(WEIGHT, GRAM, bits=3, steps=20, rate=5.0, lowest=0.6, highest=0.9)
    assert 0.6 <= float(made.notes[0].removeprefix("exponent ")) <= 0.9
    layer = disturbed(Nupes(WEIGHT, bits=3, lowest=0.6, highest=0.9), growth=-5.0)
    layer.settle()
    assert layer.exponent == pytest.approx(0.6)


@pytest.mark.parametrize("bits", [3, 4])
def test_learning_lowers_the_error_of_the_output(bits):
    grid = {"bits": bits, "group": 16}
    before = PROBLEM.judged([powerquant(WEIGHT, **grid).dequantize()])
    learned = nupes(WEIGHT, GRAM, steps=100, **grid)
    assert PROBLEM.judged([learned.dequantize()]) < before


def test_the_codes_are_those_of_the_weight_that_was_learned():
    layer = Nupes(WEIGHT, bits=3, group=20, steps=20)
    learn([layer], PROBLEM)
    assert float(layer.growth.detach()) != 0
    assert torch.equal(layer.coded().dequantize(), layer.weight().detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(dtype):
    weight = WEIGHT.to(dtype)
    halves, full = (nupes(one, GRAM, bits=4, steps=10) for one in (weight, weight.float()))
    assert torch.equal(halves.dequantize(), full.dequantize())


@pytest.mark.parametrize("shape", [(1, 64), (5, 61), (48, 1)])
def test_any_shape_will_do(shape):
    weight = torch.randn(shape, generator=NOISE)
    gram = torch.eye(shape[1])
    made = nupes(weight, gram, bits=6, group=16, steps=5)
    assert OutputError(weight, gram).judged([made.dequantize()]) < 1e-2


def test_a_layer_of_zeros_stays_one_and_one_that_no_token_reached_its_powers():
    assert not nupes(torch.zeros(4, 64), GRAM, bits=3, steps=10).dequantize().any()
    unseen = nupes(WEIGHT, torch.zeros(64, 64), bits=3, steps=10)
    assert torch.equal(unseen.dequantize(), powerquant(WEIGHT, bits=3).dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_stored_is_read_back(symmetric):
    made = nupes(WEIGHT, GRAM, bits=3, group=32, symmetric=symmetric, steps=10)
    told = LayerPlan(3, 32, symmetric, "nupes").told({})
    parts = made.parts(told)
    assert Quantized.read(parts, 24, 64, told).grid_values().equal(made.grid_values())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 9}, "bits is 9"),
        ({"steps": -1}, "steps is -1"),
        ({"rate": 0.0}, "rate is 0"),
        ({"lowest": 0.0}, "exponents"),
    ],
)
def test_nonsense_is_refused(options, says):
    with pytest.raises(UserError, match=says):
        nupes(WEIGHT, GRAM, **{"bits": 4} | options)


def test_a_block_is_learned_together(llama, tmp_path):
    asked = {"bits": 3, "group": 16, "calibration": "builtin", "format": "layerwise"}
    steps = {"options": {"quantize/nupes": {"steps": 20, "batch": 4, "rate": 0.05}}}
    start = lw.compress(llama, tmp_path / "one", method="powerquant", **asked, **QUICK)
    learned = lw.compress(llama, tmp_path / "two", method="nupes", **asked, **steps, **QUICK)
    assert learned.comparison.kl < start.comparison.kl
    assert learned.proof is not None
    assert all("exponent" in row.notes[0] for row in learned.layers)


@pytest.mark.trained
def test_layers_of_a_trained_model_answer_better_to_a_text_that_was_not_learned_from():
    folder = f"{ASSETS}/models/bytes-wikitext"
    model = AutoModelForCausalLM.from_pretrained(folder)
    layers = {
        name: layer
        for name, layer in model.model.layers[1].named_modules()
        if isinstance(layer, nn.Linear)
    }
    learned, unseen = (grams(model, layers, text) for text in ("valid", "test"))
    assert len(layers) == 7
    for name, layer in layers.items():
        weight = layer.weight.detach()
        problem = OutputError(weight, unseen[name])
        start = powerquant(weight, bits=3)
        made = nupes(weight, learned[name], bits=3)
        assert problem.judged([made.dequantize()]) <= problem.judged([start.dequantize()]), name


def grams(model, layers, text):
    """Of the inputs of some layers, over the first 128 x 64 bytes of a text."""
    with open(f"{ASSETS}/text/wikitext2/{text}.txt", "rb") as file:
        windows = torch.tensor(list(file.read(128 * 64))).reshape(128, 64)
    seen = {}

    def watch(name):
        def hook(layer, given):
            tokens = given[0].detach().flatten(0, 1)
            seen[name] = tokens.T @ tokens / len(tokens)

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    with torch.no_grad():
        model(windows)
    for handle in handles:
        handle.remove()
    return seen
