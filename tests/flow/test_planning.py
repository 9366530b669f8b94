"""Budgets of widths and of densities, shared out over layers."""

import pytest
import torch
from torch import nn

import layerwise as lw
from layerwise.core.errors import UserError

# A budget that is a level of the threshold's leaves nothing to share out.
LEVEL = ("threshold", 0.3)


def kept(model, plan) -> float:
    layers = lw.open(model).structure.layers
    return sum(layers[name].count * one.density for name, one in plan.layers.items())


def planned(model) -> int:
    return sum(layer.count for layer in lw.open(model).structure.layers.values())


@pytest.mark.parametrize(
    "allocator", ["uniform", "uniform_plus", "erk", "lamp", "stretch", "knapsack", "threshold"]
)
@pytest.mark.parametrize("density", [0.3, 0.55, 0.99])
def test_a_density_is_shared_out_and_never_exceeded(llama, allocator, density):
    plan = lw.plan(llama, density=density, allocate=allocator, measure="zd", group=16)
    densities = {one.density for one in plan.layers.values()}
    # A layer keeps a whole number of weights: its density may stand for one more.
    assert kept(llama, plan) <= density * planned(llama) + len(plan.layers)
    # What is not spent would not pay for one more step of the largest layer.
    step = 0.1 if allocator in ("knapsack", "threshold") else 1e-3
    assert kept(llama, plan) > density * planned(llama) - step * 2048 - len(plan.layers)
    alike = allocator in ("uniform", "uniform_plus") or (allocator, density) == LEVEL
    assert (len(densities) == 1) == alike


def test_small_layers_keep_a_weight():
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    plan = lw.plan(module, density=0.3, allocate="lamp")
    assert all(one.density * 128 >= 1 for one in plan.layers.values())


def test_a_density_alone_is_the_same_everywhere(llama):
    plan = lw.plan(llama, density=0.37)
    assert {one.density for one in plan.layers.values()} == {0.37}


def test_the_knapsack_loses_no_more_than_any_uniform_plan(llama):
    """Its objective is the sum of the errors that its own survey found."""
    looked = lw.measure(llama, (), levels=(2, 3, 4, 8), group=16)
    bits = 2.0 + 16 / 16 + 2 / 16
    for level, width in enumerate((2, 3, 4, 8)):
        plan = lw.plan(llama, budget=f"{bits - 2 + width + (width - 2) / 16}bits", group=16)
        chosen = sum(
            looked.errors[name][(2, 3, 4, 8).index(one.bits)] for name, one in plan.layers.items()
        )
        assert chosen <= sum(errors[level] for errors in looked.errors.values()) + 1e-9


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"budget": "4bits", "allocate": "lamp"}, "shares out densities"),
        ({"bits": 4, "allocate": "uniform"}, "nothing to share out"),
        ({"density": 0.0001, "allocate": "lamp"}, "lowest levels take"),
        ({"budget": "1bits"}, "leaves 1.000 bits per weight.*lowest levels take 3.125"),
        ({"budget": "60%"}, "dense files keep their size"),
        ({"budget": "3bits", "bits": 4}, "at once"),
        ({"budget": "4bits", "symmetric": False, "format": "compressed-tensors"}, "zero points"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(llama, wish, says):
    with pytest.raises(UserError, match=says):
        lw.plan(llama, group=16, **wish)


def test_the_score_of_a_layer_is_how_much_it_loses_at_the_lowest_level(llama):
    looked = lw.measure(llama, (), levels=(2,), group=16)
    plan = lw.plan(llama, budget="4.5bits", group=16)
    for name, one in plan.layers.items():
        assert one.score == pytest.approx(looked.errors[name][0], rel=1e-3)


@pytest.mark.parametrize("format", ["compressed-tensors", "layerwise"])
@pytest.mark.parametrize("share", [55, 63.7, 75])
def test_a_budget_of_files_is_kept_with_headers_and_all(make_llama, tmp_path, format, share):
    model = make_llama(tmp_path / "model", dtype=torch.bfloat16, blocks=3)
    before = (model / "model.safetensors").stat().st_size
    wish = {"group": 16, "symmetric": True, "format": format, "proof": "none"}
    lw.compress(model, tmp_path / "share", budget=f"{share}%", **wish)
    lw.compress(model, tmp_path / "size", budget=f"{before * share / 100:.0f}B", **wish)
    for name in ("share", "size"):
        written = sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors"))
        assert written <= before * share / 100
        assert written > before * (share - 8) / 100


def test_layers_that_a_method_scales_together_get_one_width(llama, text):
    made = lw.plan(
        llama,
        budget="4.2bits",
        method="awq",
        group=16,
        calibration=str(text),
        samples=4,
        length=32,
    )
    layers = lw.open(llama).structure.layers
    for name, layer in layers.items():
        together = [n for n, other in layers.items() if other.reads == layer.reads]
        if layer.feeder:
            assert {made.layers[n].bits for n in together} == {made.layers[name].bits}


def test_a_plan_and_a_wish_are_refused_together(llama, tmp_path):
    plan = lw.plan(llama, bits=4, group=16)
    with pytest.raises(UserError, match="bits says it too"):
        lw.compress(llama, tmp_path / "out", plan=plan, bits=8)


def test_thresholds_go_by_any_measure(llama):
    plan = lw.plan(llama, budget="3.5bits", group=16, allocate="threshold", measure="weight_error")
    assert {one.bits for one in plan.layers.values()} == {2, 3}


def test_a_measure_of_blocks_needs_blocks():
    module = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    with pytest.raises(UserError, match="runs as a whole"):
        lw.measure(module, "lim", calibration=torch.randn(64, 32))
