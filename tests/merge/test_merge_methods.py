"""Merges against their definitions written slowly, and what they must do in plain cases."""

import math

import pytest
import torch

from layerwise.core.reading.symmetry import Symmetry
from layerwise.merge.dare import dare
from layerwise.merge.fisher import fisher
from layerwise.merge.linear import linear
from layerwise.merge.lwptv import lwptv
from layerwise.merge.regmean import regmean
from layerwise.merge.slerp import slerp
from layerwise.merge.task_arithmetic import task_arithmetic
from layerwise.merge.ties import ties
from layerwise.merge.unconstrained import unconstrained
from layerwise.merge.weight_matching import weight_matching
from layerwise.merge.wise_ft import wise_ft

EVEN = torch.ones(3)


@pytest.fixture
def models():
    return torch.randn(3, 6, 8)


@pytest.fixture
def base():
    return torch.randn(6, 8)


def products(models):
    flat = models.double().flatten(1)
    return flat @ flat.T


def test_linear_with_weights_that_are_no_fractions(models):
    merged = linear(models, torch.tensor([1.0, 2.0, -0.5]), normalize=False)
    torch.testing.assert_close(merged, models[0] + 2 * models[1] - 0.5 * models[2])


def test_slerp_is_the_arc(models):
    first, second = models[:2].double()
    for t in (0.1, 0.5, 0.8):
        shares = torch.tensor([1 - t, t])
        merged = slerp(models[:2], shares, products(models[:2])).double()
        angle = torch.acos((first * second).sum() / (first.norm() * second.norm()))
        expected = ((1 - t) * angle).sin() / angle.sin() * first
        expected += (t * angle).sin() / angle.sin() * second
        torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


def test_slerp_keeps_the_length_of_equally_long_tensors():
    pair = torch.nn.functional.normalize(torch.randn(2, 400), dim=1)
    merged = slerp(pair, torch.tensor([0.3, 0.7]), products(pair))
    assert float(merged.norm()) == pytest.approx(1, abs=1e-6)


def test_slerp_ends_are_the_models_and_zero_is_no_direction(models):
    pair = models[:2]
    assert torch.equal(slerp(pair, torch.tensor([1.0, 0.0]), products(pair)), pair[0])
    assert torch.equal(slerp(pair, torch.tensor([0.0, 1.0]), products(pair)), pair[1])
    nothing = torch.stack([torch.zeros(6, 8), models[0]])
    half = slerp(nothing, torch.tensor([0.5, 0.5]), products(nothing))
    torch.testing.assert_close(half, models[0] / 2)


def test_task_arithmetic_with_even_parts_is_the_average(models, base):
    merged = task_arithmetic(models, base, EVEN, scale=1 / 3)
    torch.testing.assert_close(merged, models.mean(dim=0), rtol=1e-5, atol=1e-6)
    assert torch.equal(task_arithmetic(models, base, EVEN, scale=0.0), base)


def slow_ties(models, base, weights, density, scale):
    merged = base.double().clone()
    trimmed = []
    for model in models:
        difference = (model - base).double().flatten()
        kept = round(density * len(difference))
        cut = sorted(difference.abs().tolist(), reverse=True)[kept - 1]
        trimmed.append([x if abs(x) >= cut else 0.0 for x in difference.tolist()])
    for place in range(base.numel()):
        values = [w * one[place] for w, one in zip(weights, trimmed, strict=True)]
        sign = 1 if sum(values) >= 0 else -1
        agreed = [(v, w) for v, w in zip(values, weights, strict=True) if v * sign > 0]
        if agreed:
            part = sum(v for v, _ in agreed) / sum(w for _, w in agreed)
            merged.view(-1)[place] += scale * part
    return merged


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 1.0]])
def test_ties_is_its_definition(models, base, density, weights):
    kept = round(density * base.numel())
    cuts = (models - base).abs().flatten(1).sort(dim=1, descending=True).values[:, kept - 1]
    merged = ties(models, base, torch.tensor(weights), cuts, scale=0.7)
    expected = slow_ties(models, base, weights, density, 0.7)
    torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-6)


def test_ties_keeps_all_that_is_as_large_as_the_cut():
    base = torch.zeros(1, 8)
    models = torch.tensor([[0.5, -0.5, 0.5, 0.25, 0.25, 0.0, 0.5, -0.25]])
    merged = ties(models[None], base, torch.ones(1), torch.tensor([0.5]))
    assert merged.tolist() == [[0.5, -0.5, 0.5, 0, 0, 0, 0.5, 0]]


def test_dare_expects_what_task_arithmetic_gives(base):
    models = base + torch.randn(2, 6, 8) / 10
    entries = torch.arange(base.numel()).reshape(base.shape)
    shares, keys = torch.ones(2), [1, 2]
    drawn = torch.stack(
        [dare(models, base, shares, entries, keys, density=0.25, seed=n) for n in range(1500)]
    )
    expected = task_arithmetic(models, base, shares, scale=1.0)
    # A kept difference d is d / p with probability p: its variance is d^2 (1 - p) / p.
    deviation = ((models - base).square().sum(dim=0) * 3 / 1500).sqrt()
    assert bool(((drawn.mean(dim=0) - expected).abs() < 4.5 * deviation + 1e-5).all())
    kept = (drawn[0] != base).float().mean()
    assert 0.2 < float(kept) < 0.7
    whole = dare(models, base, shares, entries, keys, density=1.0)
    torch.testing.assert_close(whole, expected)


def test_wise_ft_goes_from_the_base_to_the_tuned_model(models, base):
    tuned = models[:1]
    assert torch.equal(wise_ft(tuned, base, alpha=0.0), base)
    assert torch.equal(wise_ft(tuned, base, alpha=1.0), tuned[0])
    torch.testing.assert_close(wise_ft(tuned, base), (base + tuned[0]) / 2)


def grams(count, width):
    inputs = torch.randn(count, 40, width) * torch.linspace(0.2, 2, width)
    return inputs.transpose(1, 2) @ inputs / 40


def misfit(weight, models, grams):
    return sum(
        float(torch.trace((weight - one).double() @ gram.double() @ (weight - one).double().T))
        for one, gram in zip(models, grams, strict=True)
    )


def test_regmean_is_the_least_squares_fit(models):
    seen = grams(3, 8)
    merged = regmean(models, EVEN, seen, off_diagonal=1.0, ridge=1e-9)
    together = seen.double().sum(dim=0)
    pull = sum(one.double() @ gram.double() for one, gram in zip(models, seen, strict=True))
    expected = pull @ torch.linalg.inv(together)
    torch.testing.assert_close(merged.double(), expected, rtol=1e-4, atol=1e-5)
    assert misfit(merged, models, seen) < misfit(models.mean(dim=0), models, seen)


def test_regmean_of_equal_inputs_and_of_none_is_the_average(models):
    seen = grams(1, 8).expand(3, 8, 8)
    average = models.mean(dim=0)
    torch.testing.assert_close(regmean(models, EVEN, seen), average, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(regmean(models, EVEN, None), average)
    torch.testing.assert_close(regmean(models, EVEN, torch.zeros(3, 8, 8)), average)


def test_an_input_that_no_model_has_keeps_the_average(models):
    seen = grams(3, 8)
    seen[:, 3], seen[:, :, 3] = 0.0, 0.0
    merged = regmean(models, EVEN, seen)
    torch.testing.assert_close(merged[:, 3], models.mean(dim=0)[:, 3])


def test_fisher_weighs_entries(models):
    known = torch.rand(3, 6, 8) + 0.1
    expected = (known * models).sum(dim=0) / known.sum(dim=0)
    torch.testing.assert_close(fisher(models, EVEN, known), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fisher(models, EVEN, torch.zeros(3, 6, 8)), models.mean(dim=0))
    alone = fisher(models, torch.tensor([0.0, 1.0, 0.0]), known)
    torch.testing.assert_close(alone, models[1])


def network(hidden=12, seed=0):
    noise = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(shape, generator=noise)

    return {
        "0.weight": drawn(hidden, 6),
        "0.bias": drawn(hidden),
        "2.weight": drawn(hidden, hidden),
        "2.bias": drawn(hidden),
        "4.weight": drawn(3, hidden),
        "4.bias": drawn(3),
    }


def answer(state, inputs):
    for layer in ("0", "2"):
        inputs = (inputs @ state[f"{layer}.weight"].T + state[f"{layer}.bias"]).relu()
    return inputs @ state["4.weight"].T + state["4.bias"]


SPEC = (
    Symmetry("first", {"0.weight": 0, "0.bias": 0, "2.weight": 1}),
    Symmetry("second", {"2.weight": 0, "2.bias": 0, "4.weight": 1}),
)


def shuffled(state):
    one, two = torch.randperm(12), torch.randperm(12)
    return {
        "0.weight": state["0.weight"][one],
        "0.bias": state["0.bias"][one],
        "2.weight": state["2.weight"][two][:, one],
        "2.bias": state["2.bias"][two],
        "4.weight": state["4.weight"][:, two],
        "4.bias": state["4.bias"],
    }


def test_weight_matching_undoes_a_permutation():
    state = network()
    other = shuffled(state)
    inputs = torch.randn(5, 6)
    torch.testing.assert_close(answer(other, inputs), answer(state, inputs))
    merged = weight_matching([state, other], SPEC)
    for name, tensor in state.items():
        torch.testing.assert_close(merged[name], tensor)


def test_weight_matching_brings_others_nearer():
    first, second = network(seed=1), network(seed=2)
    merged = weight_matching([first, second], SPEC)
    plain = {name: (first[name] + second[name]) / 2 for name in first}
    far = sum(float((plain[n] - first[n]).square().sum()) for n in first)
    near = sum(float((merged[n] - first[n]).square().sum()) for n in first)
    assert near < far


def test_lwptv_leaves_out_what_deviates_least():
    origin = network()
    states = []
    for layer in ("0", "2", "4"):
        state = {name: one + 0.01 for name, one in origin.items()}
        state[f"{layer}.weight"] = state[f"{layer}.weight"] + 1
        states.append(state)
    merged = lwptv(states, origin, pruned=2 / 3, scale=1.0)
    for layer, state in zip(("0", "2", "4"), states, strict=True):
        for kind in ("weight", "bias"):  # a bias follows its matrix
            name = f"{layer}.{kind}"
            torch.testing.assert_close(merged[name], state[name])


def test_lwptv_at_its_ends():
    origin, states = network(), [network(seed=1), network(seed=2)]
    nothing = lwptv(states, origin, pruned=1.0)
    assert all(torch.equal(nothing[name], one) for name, one in origin.items())
    everything = lwptv(states, origin, pruned=0.0, scale=0.4)
    for name, one in origin.items():
        both = torch.stack([states[0][name], states[1][name]])
        expected = task_arithmetic(both, one, torch.ones(2), scale=0.4)
        torch.testing.assert_close(everything[name], expected)


def test_unconstrained_finds_what_each_layer_needs():
    origin, first, second = network(), network(seed=1), network(seed=2)
    wanted = {
        name: one + 0.8 * (first[name] - one)
        if name[0] == "0"
        else one + 0.6 * (second[name] - one)
        for name, one in origin.items()
    }

    def loss(state):
        return sum(float((state[n] - one).square().sum()) for n, one in wanted.items())

    found = unconstrained([first, second], origin, loss, generations=15)
    uniform = min(
        loss(
            {
                n: task_arithmetic(
                    torch.stack([first[n], second[n]]), origin[n], torch.ones(2), scale=s
                )
                for n in origin
            }
        )
        for s in (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
    )
    assert loss(found) < 0.7 * uniform
    assert math.isfinite(loss(found))
