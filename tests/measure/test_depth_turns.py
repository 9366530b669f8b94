"""Angles over several blocks, and Jacobians, against those of the model itself."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import layerwise as lw
from layerwise.core import catalogue
from layerwise.core.errors import UserError
from layerwise.measure.angular_distance import angular_distance
from layerwise.measure.jacobian_distance import jacobian_distance

TEXT = torch.arange(4 * 16).remainder(251).reshape(4, 16)
SHOWN = {"calibration": TEXT, "samples": 4, "length": 16, "cache": False}


def test_angles_are_those_of_the_model_s_states(llama):
    found = lw.inspect(llama, "angular_distance", **SHOWN)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    kept = []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    model.model.norm.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with torch.no_grad():
        model(TEXT)
    for block in (0, 1):
        pairs = [(kept[block][w, t], kept[2][w, t]) for w in range(4) for t in range(1, 16)]
        angles = [
            math.acos(float(torch.cosine_similarity(a, b, dim=0))) / math.pi for a, b in pairs
        ]
        layer = f"model.layers.{block}.mlp.up_proj"
        assert found.scores["angular_distance"][layer] == pytest.approx(
            sum(angles) / len(angles), rel=1e-3
        )
        assert found.details["angular_distance.blocks"][layer] == 2 - block


def test_the_run_that_turns_least():
    across = catalogue.get("measure/angular_distance").across
    records = [
        {"angle": angle, "blocks": span}
        for angle, span in ((0.3, 2.0), (0.1, 2.0), (0.2, 2.0), (0.0, 1.0))
    ]
    assert across(records) == {"start": 1.0, "least": 0.1}
    same = [torch.randn(6, 4)] * 3
    found = angular_distance(same, torch.arange(6))
    assert found["angle"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="0 blocks"):
        angular_distance(same, torch.arange(6), blocks=0)


def test_the_jacobian_is_that_of_the_block(llama):
    found = lw.inspect(llama, "jacobian_distance", **SHOWN).scores["jacobian_distance"]
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).double().eval()
    drawn = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).double()
    towards = drawn.reshape(4, 16, 32)
    for number, block in enumerate(model.model.layers):
        seen, answers = [], []

        def move(_, args, kwargs, step=0.0, seen=seen):
            seen.append(args[0])
            return (args[0] + step * towards, *args[1:]), kwargs

        for step in (1e-5, -1e-5):
            hook = block.register_forward_pre_hook(
                lambda m, a, k, step=step: move(m, a, k, step), with_kwargs=True
            )
            keep = block.register_forward_hook(
                lambda _, __, out, kept=answers: kept.append(
                    out[0] if isinstance(out, tuple) else out
                )
            )
            with torch.no_grad():
                model(TEXT)
            hook.remove()
            keep.remove()
        turned = (answers[0] - answers[1]) / 2e-5
        gap = (turned - towards)[:, 1:].norm(dim=-1) / towards[:, 1:].norm(dim=-1)
        layer = f"model.layers.{number}.mlp.up_proj"
        assert found[layer] == pytest.approx(float(gap.mean()), rel=1e-3)


def test_a_block_that_scales_is_as_far_as_its_scale():
    inputs, positions = torch.randn(12, 5), torch.arange(12) % 4
    found = jacobian_distance(inputs, lambda v: 3 * v, positions, draws=2)
    assert found == pytest.approx(2.0)
    with pytest.raises(UserError, match="0 directions"):
        jacobian_distance(inputs, lambda v: v, positions, draws=0)
