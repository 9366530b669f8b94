"""Heads that copy what came before, by their attention, and what of the loss hangs on them."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import layerwise as lw
from layerwise.core import catalogue
from layerwise.core.errors import UserError
from layerwise.core.running.runner import Runner
from layerwise.flow.pairing import ECHO_TOKENS, _echoed
from layerwise.measure.context_gain import context_gain
from layerwise.measure.induction import induction

TEXT = torch.arange(8 * 32).remainder(251).reshape(8, 32)
SHOWN = {"calibration": TEXT, "samples": 8, "length": 32, "cache": False}


def test_is_the_mean_attention_written_out():
    maps = torch.rand(3, 2, 10, 10).tril().add(1e-3)
    maps = maps / maps.sum(dim=-1, keepdim=True)
    expected = {}
    for name, back, asking in (
        ("induction", 4, range(5, 10)),
        ("same", 5, range(5, 10)),
        ("previous", 1, range(1, 10)),
    ):
        means = [
            sum(float(maps[w, h, i, i - back]) for w in range(3) for i in asking)
            / (3 * len(asking))
            for h in range(2)
        ]
        expected[name] = max(means)
    assert induction(maps) == pytest.approx(expected, rel=1e-6)


def test_a_perfect_head_and_one_that_looks_everywhere():
    length, half = 16, 8
    perfect = torch.zeros(length, length)
    for i in range(length):
        perfect[i, max(0, i - half + 1)] = 1
    even = torch.ones(length, length).tril()
    even = even / even.sum(dim=1, keepdim=True)
    both = torch.stack([even, perfect])[None]
    assert induction(both)["induction"] == 1
    assert induction(both)["same"] == pytest.approx(float((1 / torch.arange(9.0, 17)).mean()))


def test_a_model_has_the_best_of_its_blocks_and_what_was_before_it():
    across = catalogue.get("measure/induction").across
    records = [
        {"induction": 0.1, "same": 0.0, "previous": 0.7},
        {"induction": 0.8, "same": 0.0, "previous": 0.2},
        {"induction": 0.3, "same": 0.0, "previous": 0.9},
    ]
    assert across(records) == {"best": 0.8, "place": 1.0, "previous_before": 0.7}
    assert across(records[2:]) == {"best": 0.3, "place": 0.0, "previous_before": 0.0}


def test_reads_the_attention_of_the_model_itself(llama):
    found = lw.inspect(llama, "induction", **SHOWN)
    model = AutoModelForCausalLM.from_pretrained(
        llama, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    opened = lw.open(llama)
    ids = _echoed(Runner(opened.source, opened.structure), TEXT)
    assert ids.shape == (16, 32)
    assert torch.equal(ids[:, :16], ids[:, 16:])
    assert all(len(set(row[:16].tolist())) == 16 for row in ids)
    with torch.no_grad():
        maps = model(ids, output_attentions=True).attentions
    for number, one in enumerate(maps):
        layer = f"model.layers.{number}.mlp.up_proj"
        for name, value in induction(one).items():
            assert found.details[f"induction.{name}"][layer] == pytest.approx(value, rel=1e-4)
    assert found.about["induction"]["best"] == max(found.scores["induction"].values())


def test_a_text_too_poor_to_repeat_is_refused(llama):
    poor = torch.zeros(2, 32, dtype=torch.long)
    with pytest.raises(UserError, match="could come twice"):
        lw.inspect(llama, "induction", calibration=poor, samples=2, length=32, cache=False)
    long = torch.arange(400).reshape(1, 400)
    opened = lw.open(llama)
    runner = Runner(opened.source, opened.structure)
    assert _echoed(runner, long).shape == (16, 2 * ECHO_TOKENS)


def test_the_gain_is_the_loss_of_the_beginning_less_that_of_the_end():
    ids = torch.randint(7, (5, 21))
    known, left = (torch.randn(5, 21, 7).log_softmax(-1) for _ in range(2))

    def gain(answers, places):
        losses = [[-float(answers[w, i, ids[w, i + 1]]) for i in range(20)] for w in range(5)]
        return sum(
            sum(row[:places]) / places - sum(row[-places:]) / places for row in losses
        ) / len(losses)

    for share, places in ((0.25, 5), (0.5, 10), (0.01, 1)):
        expected = {"lost": gain(known, places) - gain(left, places), "gain": gain(left, places)}
        found = context_gain(known.split(2), left.split(2), ids, share=share)
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    with pytest.raises(UserError, match=r"0\.6"):
        context_gain([known], [left], ids, share=0.6)


def test_the_model_s_own_gain_is_that_of_no_block(llama):
    found = lw.inspect(llama, "context_gain", **SHOWN)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    with torch.no_grad():
        answers = model(TEXT).logits.log_softmax(-1)
    expected = context_gain([answers], [answers], TEXT)
    assert expected["lost"] == 0
    assert found.about["context_gain"]["gain"] == pytest.approx(expected["gain"], abs=1e-4)
