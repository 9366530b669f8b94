"""FlexRound against its definition, and what division can and cannot do to a weight."""

import math

import pytest
import torch

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.learning import OutputError, learn
from layerwise.quantize.flexround import FlexRound, flexround
from layerwise.quantize.rtn import rtn

NOISE = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(24, 64, generator=NOISE)
INPUTS = torch.randn(500, 64, generator=NOISE) @ torch.randn(64, 64, generator=NOISE)
GRAM = INPUTS.T @ INPUTS / len(INPUTS)
QUICK = {"text": "builtin", "text_samples": 4, "length": 64, "samples": 16, "noise_floor": False}


def disturbed(layer, size=0.3):
    """The same layer, at parameters that were moved at random."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensors in layer.parameters().values():
            for tensor in tensors:
                tensor.add_(size * torch.randn(tensor.shape, generator=noise))
    return layer


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 64), (3, 20), (8, 16), (16, 1)])
def test_no_steps_are_rounding_to_nearest(bits, group, symmetric):
    grid = {"bits": bits, "group": group, "symmetric": symmetric}
    made, nearest = flexround(WEIGHT, GRAM, steps=0, **grid), rtn(WEIGHT, **grid)
    assert torch.equal(made.codes, nearest.codes)
    assert torch.equal(made.scale, nearest.scale)
    assert torch.equal(made.dequantize(), nearest.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
def test_matches_the_equations(symmetric):
    layer = disturbed(FlexRound(WEIGHT, bits=3, group=20, symmetric=symmetric))
    made = layer.coded()
    scale, zero = made.scale.double(), made.zero
    divisor, row_divisor = layer.divisor.detach(), layer.row_divisor.detach()
    for row in range(24):
        for column in range(64):
            group, place = divmod(column, 20)
            s1 = float(scale[row, group])
            s2 = math.exp(float(divisor[row, group, place]))
            s3 = math.exp(float(row_divisor[row, 0, 0]))
            steps = round(float(WEIGHT[row, column]) / (s1 * s2 * s3))
            code = min(max(steps + int(zero[row, group]), 0), 7)
            assert int(made.codes[row, column]) == code
            restored = s1 * (code - int(zero[row, group]))
            assert float(made.dequantize()[row, column]) == pytest.approx(restored, rel=1e-6)


def test_the_gradient_of_a_divisor_is_that_of_its_weight_times_the_weight():
    layer = disturbed(FlexRound(WEIGHT, bits=3, group=64, symmetric=False))
    given = torch.randn(24, 64, generator=NOISE)
    with torch.enable_grad():
        (layer.weight() * given).sum().backward()
    divided = WEIGHT / (layer.divisor + layer.row_divisor).detach().exp()[:, 0]
    made = layer.coded()
    steps = (divided / made.scale.float()).round() + made.zero
    inside = (steps >= 0) & (steps <= 7)
    assert not bool(inside.all())
    expected = -given * divided * inside
    torch.testing.assert_close(layer.divisor.grad[:, 0], expected)
    torch.testing.assert_close(layer.row_divisor.grad[:, 0, 0], expected.sum(dim=1))
    # The step multiplies the codes, and divides the weight before.
    codes = (made.codes - made.zero).float() * (layer.scale * layer.step.exp()).detach()
    torch.testing.assert_close(
        layer.step.grad[:, 0], (given * codes + expected).sum(dim=1), rtol=0.02, atol=0.1
    )


def test_a_divisor_moves_large_weights_far_small_ones_not_at_all_and_changes_no_sign():
    layer = FlexRound(WEIGHT, bits=4, group=64, symmetric=True)
    start = layer.coded().codes.int() - 8
    with torch.no_grad():
        layer.divisor.fill_(0.5)
    moved = layer.coded().codes.int() - 8
    towards_zero = (start - moved) * WEIGHT.sign()
    assert bool((towards_zero >= 0).all())
    assert int(towards_zero[start.abs() >= 6].min()) > 1
    assert not towards_zero[start == 0].any()
    assert bool((disturbed(layer).coded().dequantize() * WEIGHT >= 0).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_zeros_stay_and_codes_are_in_range(bits, symmetric):
    pruned = WEIGHT.where(WEIGHT.abs() > 0.7, 0.0)
    layer = FlexRound(pruned, bits=bits, group=20, symmetric=symmetric, steps=30, rate=0.05)
    learn([layer], OutputError(pruned, GRAM))
    made = disturbed(layer).coded()
    assert bool((made.dequantize()[pruned == 0] == 0).all())
    assert int(made.codes.max()) < 2**bits


def test_zeros_have_no_gradient():
    pruned = WEIGHT.where(WEIGHT.abs() > 0.7, 0.0)
    layer = FlexRound(pruned, bits=3, group=64)
    with torch.enable_grad():
        OutputError(WEIGHT, GRAM).loss([layer.weight()], 0).backward()
    assert not layer.divisor.grad[:, 0][pruned == 0].any()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_learning_lowers_the_error_of_the_output(bits):
    grid = {"bits": bits, "group": 16, "symmetric": False}
    problem = OutputError(WEIGHT, GRAM)
    before = problem.judged([rtn(WEIGHT, **grid).dequantize()])
    made = flexround(WEIGHT, GRAM, steps=100, **grid)
    assert problem.judged([made.dequantize()]) < before


def test_the_codes_are_those_of_the_weight_that_was_learned():
    layer = FlexRound(WEIGHT, bits=2, group=20, steps=10)
    learn([layer], OutputError(WEIGHT, GRAM))
    assert torch.equal(layer.coded().dequantize(), layer.weight().detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(dtype):
    weight = WEIGHT.to(dtype)
    halves, full = (
        flexround(one, GRAM, bits=4, group=16, steps=10) for one in (weight, weight.float())
    )
    assert torch.equal(halves.dequantize(), full.dequantize())


def test_dead_inputs_and_layers_that_no_token_reached_are_rounded_to_nearest():
    grid = {"bits": 3, "group": 16}
    unseen = flexround(WEIGHT, torch.zeros(64, 64), steps=10, **grid)
    assert torch.equal(unseen.dequantize(), rtn(WEIGHT, **grid).dequantize())
    assert not flexround(torch.zeros(4, 64), GRAM, steps=10, **grid).dequantize().any()


@pytest.mark.parametrize(
    ("options", "says"),
    [({"steps": -1}, "steps is -1"), ({"batch": 0}, "batch is 0"), ({"rate": 0.0}, "rate is 0")],
)
def test_nonsense_is_refused(options, says):
    with pytest.raises(UserError, match=says):
        flexround(WEIGHT, GRAM, bits=4, **options)


def test_a_block_is_learned_together(llama, tmp_path):
    asked = {"bits": 3, "group": 16, "method": "flexround", "calibration": "builtin"}
    steps = {"options": {"quantize/flexround": {"steps": 20, "batch": 4, "rate": 0.01}}}
    nearest = lw.compress(llama, tmp_path / "rtn", bits=3, group=16, calibration="builtin", **QUICK)
    learned = lw.compress(llama, tmp_path / "out", **asked, **steps, **QUICK)
    assert learned.comparison.kl < nearest.comparison.kl
