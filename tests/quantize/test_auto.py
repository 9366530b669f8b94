"""Auto: which candidate wins, and what is learned from there."""

import pytest
import torch

import layerwise as lw
from layerwise.core.learning import OutputError
from layerwise.quantize.auto import Auto, auto
from layerwise.quantize.gptq import gptq
from layerwise.quantize.rtn import rtn

NOISE = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(24, 64, generator=NOISE)
INPUTS = torch.randn(500, 64, generator=NOISE) @ torch.randn(64, 64, generator=NOISE)
GRAM = INPUTS.T @ INPUTS / len(INPUTS)
# A few inputs far above the rest: the order of rounding matters.
UNEVEN = torch.ones(64).index_fill(0, torch.tensor([3, 40]), 20.0)
PROBLEM = OutputError(WEIGHT, GRAM)


def test_with_no_steps_it_is_the_best_candidate():
    made = auto(WEIGHT, GRAM, bits=3, group=16, steps=0)
    assert torch.equal(made.dequantize(), gptq(WEIGHT, GRAM, bits=3, group=16).dequantize())
    assert made.notes[-1] == "gptq"


@pytest.mark.parametrize("symmetric", [True, False])
def test_learning_starts_where_the_candidate_is(symmetric):
    grid = {"bits": 3, "group": 16, "symmetric": symmetric}
    layer = Auto(WEIGHT, GRAM, **grid)
    start = gptq(WEIGHT, GRAM, **grid).dequantize()
    assert torch.equal(layer.weight().detach(), start)


def test_what_is_learned_is_never_worse_than_the_candidate():
    for bits in (2, 3, 4):
        start = gptq(WEIGHT, GRAM, bits=bits, group=16)
        made = auto(WEIGHT, GRAM, bits=bits, group=16, steps=40)
        judged = [PROBLEM.judged([one.dequantize()]) for one in (start, made)]
        assert judged[1] <= judged[0]


def test_the_order_of_energies_is_tried_where_inputs_are_uneven():
    gram = UNEVEN[:, None] * GRAM * UNEVEN
    candidates = {
        "gptq": gptq(WEIGHT, gram, bits=3, group=16),
        "gptq act_order": gptq(WEIGHT, gram, bits=3, group=16, act_order=True),
    }
    problem = OutputError(WEIGHT, gram)
    best = min(candidates, key=lambda name: problem.judged([candidates[name].dequantize()]))
    assert auto(WEIGHT, gram, bits=3, group=16, steps=0).notes[-1] == best


def test_layers_that_no_token_reached_are_rounded_to_nearest():
    unseen = auto(WEIGHT, torch.zeros(64, 64), bits=3, group=16, steps=0)
    assert torch.equal(unseen.dequantize(), rtn(WEIGHT, bits=3, group=16).dequantize())
    assert unseen.notes[-1] == "rtn"


def test_nothing_is_learned_from_eight_bits_on():
    fine = auto(WEIGHT, GRAM, bits=8, group=16)
    assert torch.equal(fine.dequantize(), gptq(WEIGHT, GRAM, bits=8, group=16).dequantize())


def test_the_report_says_which_candidate_won_where(llama, tmp_path):
    report = lw.compress(
        llama,
        tmp_path / "out",
        bits=3,
        group=16,
        method="auto",
        options={"quantize/auto": {"steps": 8, "batch": 4}},
        calibration="builtin",
        text="builtin",
        text_samples=4,
        samples=16,
        length=64,
    )
    assert all(any(note.startswith("gptq") for note in row.notes) for row in report.layers)
