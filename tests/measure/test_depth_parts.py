"""Attributions, erased tokens and linear maps between models, against definitions written out."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import layerwise as lw
from layerwise.core import catalogue
from layerwise.core.errors import UserError
from layerwise.flow.pairing import ATTRIBUTED_STEPS
from layerwise.measure.integrated_gradients import integrated_gradients
from layerwise.measure.linear_map import linear_map
from layerwise.measure.residual_erasure import residual_erasure

TEXT = torch.arange(4 * 16).remainder(251).reshape(4, 16)
SHOWN = {"calibration": TEXT, "samples": 4, "length": 16, "cache": False}


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def with_input(model, block, change):
    """What the model answers with what a block is given changed."""
    hook = model.model.layers[block].register_forward_pre_hook(
        lambda _, args, kwargs: ((change(args[0]), *args[1:]), kwargs), with_kwargs=True
    )
    try:
        return model(TEXT).logits
    finally:
        hook.remove()


def test_attribution_is_that_of_gradients_along_the_way(llama):
    found = lw.inspect(llama, "integrated_gradients", **SHOWN)
    model = loaded(llama).requires_grad_(False)
    for block in (0, 1):
        kept = []
        with torch.no_grad():
            logits = with_input(model, block, lambda h, kept=kept: kept.append(h) or h)
        given = kept[0]
        middle = given.mean(dim=1, keepdim=True)
        total = torch.zeros(4, 16)
        for step in range(ATTRIBUTED_STEPS):
            share = (step + 0.5) / ATTRIBUTED_STEPS
            here = (middle + share * (given - middle)).requires_grad_()
            answer = with_input(model, block, lambda _, here=here: here)
            chance = answer[:, -2].softmax(-1).gather(1, TEXT[:, -1:]).sum()
            total += ((given - middle) * torch.autograd.grad(chance, here)[0]).sum(-1)
        expected = integrated_gradients(total[:, :-1] / ATTRIBUTED_STEPS)
        layer = f"model.layers.{block}.mlp.up_proj"
        for name, value in expected.items():
            told = found.details[f"integrated_gradients.{name}"][layer]
            assert told == pytest.approx(value, rel=1e-3, abs=1e-6)
        # All of it is what the probability gains on the way.
        with torch.no_grad():
            base = with_input(model, block, lambda _, at=middle: at.expand(4, 16, -1))
        gains = [one[:, -2].softmax(-1).gather(1, TEXT[:, -1:])[:, 0] for one in (logits, base)]
        moved = float((gains[0] - gains[1]).abs().mean())
        assert expected["moved"] == pytest.approx(moved, rel=0.02, abs=1e-6)


def test_what_hangs_on_the_last_token_alone_hangs_on_no_other():
    only = torch.zeros(2, 5)
    only[:, -1] = 0.3
    assert integrated_gradients(only)["earlier"] == 0
    assert integrated_gradients(-only.flip(1))["earlier"] == 1
    assert integrated_gradients(torch.zeros(2, 5)) == {"earlier": 0.0, "moved": 0.0}
    across = catalogue.get("measure/integrated_gradients").across
    assert across([{"earlier": 1.0}, {"earlier": 1.0}, {"earlier": 0.0}])["centre"] == 0.5


def test_a_token_is_erased_before_each_block(llama):
    found = lw.inspect(llama, "residual_erasure", **SHOWN)
    model = loaded(llama)

    def erase(hidden):
        changed = hidden.clone()
        changed[:, 8] = hidden.reshape(-1, hidden.shape[-1]).mean(dim=0)
        return changed

    with torch.no_grad():
        plain = model(TEXT).logits.softmax(-1)
        for block in (0, 1):
            left = with_input(model, block, erase).softmax(-1)
            effects = [
                [abs(float((plain - left)[w, t, TEXT[w, t + 1]])) for t in range(9, 15)]
                for w in range(4)
            ]
            layer = f"model.layers.{block}.mlp.up_proj"
            largest = sum(map(max, effects)) / 4
            assert found.scores["residual_erasure"][layer] == pytest.approx(largest, rel=1e-3)
            told = found.details["residual_erasure.mean"][layer]
            assert told == pytest.approx(sum(map(sum, effects)) / 24, rel=1e-3)


def test_the_last_block_before_which_it_matters():
    across = catalogue.get("measure/residual_erasure").across
    records = [{"erased": one} for one in (0.5, 0.2, 0.06, 0.04)]
    assert across(records)["last"] == 0.75
    known = [torch.randn(3, 8, 5).log_softmax(-1)]
    ids = torch.randint(5, (3, 8))
    assert residual_erasure(known, known, ids) == {"erased": 0.0, "mean": 0.0}


def test_a_map_is_that_of_least_squares():
    states, target = torch.randn(40, 6), torch.randn(40, 4)
    positions = torch.arange(40) % 10
    kept = positions > 0
    x, y = states[kept].double(), target[kept].double()
    errors = []
    halves = slice(0, None, 2), slice(1, None, 2)
    for known, asked in (halves, halves[::-1]):
        middle, level = x[known].mean(0), y[known].mean(0)
        features = x[known] - middle
        ridge = 1e-3 * features.square().mean() * len(features) * torch.eye(6)
        weight = torch.linalg.inv(features.T @ features + ridge) @ features.T @ (y[known] - level)
        gap = (x[asked] - middle) @ weight + level - y[asked]
        errors.append(float((gap.norm(dim=1) / y[asked].norm(dim=1)).mean()))
    found = linear_map(states, positions, [target])
    assert found == pytest.approx({"error": sum(errors) / 2, "depth": 1.0})
    with pytest.raises(UserError, match=r"penalty of 0\.0"):
        linear_map(states, positions, [target], penalty=0.0)


def test_the_nearest_block_is_the_one_that_is_a_map_of_it():
    states = torch.randn(200, 6)
    others = [torch.randn(200, 5), states @ torch.randn(6, 5) + 3, torch.randn(200, 5)]
    found = linear_map(states, torch.arange(200) % 20, others)
    assert found["depth"] == pytest.approx(2 / 3)
    assert found["error"] < 0.01
    across = catalogue.get("measure/linear_map").across
    assert across([{"depth": 0.3}, {"depth": 0.6}, {"depth": 0.2}])["aligned"] == 2 / 3


def test_the_other_model_may_be_deeper(llama, make_llama, tmp_path):
    deeper = make_llama(tmp_path / "deeper", blocks=3)
    found = lw.inspect(llama, "linear_map", against=deeper, **SHOWN)
    assert {round(3 * one) for one in found.details["linear_map.depth"].values()} <= {1, 2, 3}
    same = lw.inspect(llama, "linear_map", against=llama, **SHOWN)
    assert same.about["linear_map"]["aligned"] == 1
    with pytest.raises(UserError, match=r"has no model.layers.2"):
        lw.inspect(deeper, ["linear_map", "rotation"], against=llama, **SHOWN)
