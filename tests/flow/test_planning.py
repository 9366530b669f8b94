"""Budgets of widths and of densities, shared out over layers."""

import pytest

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.flow.planning import budget_bytes

# A budget that is a level of the threshold's leaves nothing to share out.
LEVEL = ("threshold", 0.3)


def kept(model, plan) -> float:
    layers = lw.open(model).structure.layers
    return sum(layers[name].count * one.density for name, one in plan.layers.items())


def planned(model) -> int:
    return sum(layer.count for layer in lw.open(model).structure.layers.values())


@pytest.mark.parametrize("allocator", ["uniform", "lamp", "knapsack", "threshold"])
@pytest.mark.parametrize("density", [0.3, 0.55, 0.99])
def test_a_density_is_shared_out_and_never_exceeded(llama, allocator, density):
    plan = lw.plan(llama, density=density, allocate=allocator, measure="zd", group=16)
    densities = {one.density for one in plan.layers.values()}
    # A layer keeps a whole number of weights: its density may stand for one more.
    assert kept(llama, plan) <= density * planned(llama) + len(plan.layers)
    # What is not spent would not pay for one more step of the largest layer.
    step = 1e-3 if allocator in ("lamp", "uniform") else 0.1
    assert kept(llama, plan) > density * planned(llama) - step * 2048 - len(plan.layers)
    assert (len(densities) == 1) == (allocator == "uniform" or (allocator, density) == LEVEL)


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
        ({"density": 0.0001, "allocate": "lamp"}, "too small"),
        ({"budget": "1bits"}, "too small"),
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


def test_budgets_in_bytes_leave_room_for_what_is_left_alone(llama):
    opened = lw.open(llama)
    source, found = opened.source, opened.structure
    alone = sum(source.tensors[name].size for name in found.left)
    everything = sum(info.size for info in source.tensors.values())
    assert budget_bytes("50%", source, found) == everything // 2 - alone
    assert budget_bytes("0.1MiB", source, found) == int(0.1 * 2**20) - alone
    assert budget_bytes("4bits", source, found) == planned(llama) // 2
