"""PLeaS between one network's size and that of two."""

import copy

import pytest
import torch
from torch import nn

import layerwise as lw
from layerwise.core.merging.matching import permuted
from layerwise.core.reading.checkpoint import module_source
from layerwise.core.reading.symmetry import symmetries
from layerwise.flow.widening import widen
from layerwise.testing import relations


def chain(seed, classes=3, bias=True):
    torch.manual_seed(seed)
    return (
        nn.Sequential(
            nn.Linear(6, 20, bias=bias),
            nn.ReLU(),
            nn.Linear(20, 16),
            nn.Tanh(),
            nn.Dropout(),
            nn.Linear(16, classes),
        )
        .eval()
        .requires_grad_(False)
    )


@pytest.mark.parametrize("bias", [True, False])
def test_twice_the_size_is_both_networks(bias):
    first, second, inputs = chain(1, bias=bias), chain(2, classes=5, bias=bias), torch.randn(90, 6)
    wide = widen(first, second, inputs, budget=2)
    assert wide.widths == ((0, 20, 20), (0, 16, 16))
    torch.testing.assert_close(wide(inputs, 0), first(inputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wide(inputs, 1), second(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", [1.0, 1.3, 1.7])
def test_a_permuted_copy_is_the_same_function_at_any_size(budget):
    first, inputs = chain(1), torch.randn(90, 6)
    known = symmetries(module_source(nn.Sequential(first[0], first[2], first[5])))
    state = nn.Sequential(first[0], first[2], first[5]).state_dict()
    orders = {one.name: torch.randperm(one.units(state)) for one in known}
    turned = {n: permuted(n, t, known, orders) for n, t in state.items()}
    second = copy.deepcopy(first)
    for n, place in enumerate((0, 2, 5)):
        second[place].load_state_dict({k: turned[f"{n}.{k}"] for k in ("weight", "bias")})
    wide = widen(first, second, inputs, budget=budget)
    for task in (0, 1):
        torch.testing.assert_close(wide(inputs, task), first(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", [1.0, 1.2, 1.5, 1.9])
def test_the_budget_is_kept_and_nearly_used(budget):
    first, second = chain(1), chain(2)
    wide = widen(first, second, torch.randn(90, 6), budget=budget)
    one = 6 * 20 + 20 * 16
    assert wide.weights <= budget * one
    # One more unit apart of each layer is no more than this.
    assert wide.weights > budget * one - (6 + 16 + 20 + 2 * 16)
    for merged, alone, other in wide.widths:
        assert alone == other
        assert merged + alone in (20, 16)
    # What one network's own units give the other's is 0.
    layer, (m, a, _), (rows, own, _) = wide.hidden[1].weight, *wide.widths
    assert not layer[rows : rows + own, m + a :].any()
    assert not layer[rows + own :, m : m + a].any()


def test_one_network_s_size_is_what_the_merge_makes(tmp_path):
    first, second, inputs = chain(1), chain(2), torch.randn(200, 6)
    wide = widen(first, second, inputs, budget=1)
    lw.merge([first, second], tmp_path / "out", method="pleas", calibration=inputs, samples=200)
    made = lw.load(tmp_path / "out", into=first)
    # The merge may have put its units in the second network's places.
    for part, own in ((made[0], wide.hidden[0]), (made[2], wide.hidden[1])):
        values = [torch.linalg.svdvals(one.weight) for one in (part, own)]
        torch.testing.assert_close(*values, rtol=1e-2, atol=1e-2)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(lw.UserError, match="a budget of 3"):
        widen(chain(1), chain(2), torch.randn(9, 6), budget=3)
    with pytest.raises(lw.UserError, match="no chains"):
        widen(chain(1), nn.Sequential(nn.Linear(6, 3)), torch.randn(9, 6))


@pytest.mark.trained
def test_more_room_answers_better():
    images, labels = relations.digits(train=False)
    shown, _ = relations.digits(train=True)
    pair = relations.twins(0, 64)
    missed = {}
    for budget in (1.0, 1.5, 2.0):
        wide = widen(*pair, shown, budget=budget)
        answers = [wide(images, task).argmax(dim=1) for task in (0, 1)]
        missed[budget] = sum(float((one != labels).float().mean()) for one in answers) / 2
    own = sum(relations.error(one, images, labels) for one in pair) / 2
    assert missed[2.0] == pytest.approx(own, abs=0.002)
    assert missed[1.5] <= missed[1.0] + 0.005
