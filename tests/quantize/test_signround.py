"""SignRound against its definition, and codes that are learned for a whole block."""

import pytest
import torch

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.learning import OutputError, learn
from layerwise.quantize.rtn import rtn
from layerwise.quantize.signround import SignRound, signround

NOISE = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(24, 64, generator=NOISE)
INPUTS = torch.randn(500, 64, generator=NOISE) @ torch.randn(64, 64, generator=NOISE)
GRAM = INPUTS.T @ INPUTS / len(INPUTS)
QUICK = {"text": "builtin", "text_samples": 4, "length": 64, "samples": 16, "noise_floor": False}


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_steps_are_rounding_to_nearest(symmetric):
    grid = {"bits": 3, "group": 16, "symmetric": symmetric}
    made = signround(WEIGHT, GRAM, steps=0, **grid)
    assert torch.equal(made.dequantize(), rtn(WEIGHT, **grid).dequantize())


def test_a_step_moves_every_shift_against_the_sign_of_its_gradient():
    layer = SignRound(WEIGHT, bits=3, group=64, symmetric=True, steps=4)
    problem = OutputError(WEIGHT, GRAM)
    shift = torch.zeros(24, 64, requires_grad=True)
    top, high = 7, WEIGHT.abs().amax(dim=1, keepdim=True)
    scale = layer.coded().scale.float()
    assert torch.allclose(scale, 2 * high / top, rtol=1e-2)
    steps = WEIGHT / scale + shift
    inside = ((steps.round() + 4 >= 0) & (steps.round() + 4 <= top)).detach()
    values = ((steps.round() + 4).clamp(0, top) - 4).detach() * scale
    error = (values - WEIGHT) @ GRAM  # gradient of 1/2 of the error, by the weight
    expected = -torch.sign(error * inside) * layer.rate
    with torch.enable_grad():
        problem.loss([layer.weight()], 0).backward()
    assert torch.equal(-layer.shift.grad[:, 0].sign() * layer.rate, expected)


def test_learning_lowers_the_error_of_the_output():
    grid = {"bits": 3, "group": 16, "symmetric": False}
    problem = OutputError(WEIGHT, GRAM)
    before = problem.judged([rtn(WEIGHT, **grid).dequantize()])
    assert problem.judged([signround(WEIGHT, GRAM, steps=60, **grid).dequantize()]) < before


def test_the_codes_are_those_of_the_weight_that_was_learned():
    layer = SignRound(WEIGHT, bits=2, group=20, symmetric=False, steps=10)
    learn([layer], OutputError(WEIGHT, GRAM))
    assert torch.equal(layer.coded().dequantize(), layer.weight().detach())


def test_nonsense_is_refused():
    with pytest.raises(UserError, match="steps is -1"):
        signround(WEIGHT, GRAM, bits=4, steps=-1)


def test_a_block_is_learned_together_and_resumes_to_the_same_bytes(llama, tmp_path):
    asked = {"bits": 3, "group": 16, "method": "signround", "calibration": "builtin"}
    steps = {"options": {"quantize/signround": {"steps": 20, "batch": 4}}}
    nearest = lw.compress(llama, tmp_path / "rtn", bits=3, group=16, calibration="builtin", **QUICK)
    learned = lw.compress(llama, tmp_path / "one", **asked, **steps, **QUICK)
    again = lw.compress(llama, tmp_path / "two", **asked, **steps, **QUICK)
    assert learned.comparison.kl < nearest.comparison.kl
    assert learned.comparison.kl == again.comparison.kl


def test_a_budget_chooses_among_levels_that_were_learned(llama, tmp_path):
    report = lw.compress(
        llama,
        tmp_path / "out",
        budget="5bits",
        allow={"bits": (2, 4)},
        group=16,
        method="signround",
        options={"quantize/signround": {"steps": 8, "batch": 4}},
        calibration="builtin",
        **QUICK,
    )
    assert {row.bits for row in report.layers} == {2, 4}
    assert report.average_bits <= 5
