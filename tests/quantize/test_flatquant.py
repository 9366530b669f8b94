"""FlatQuant against its definition, its degenerate cases, and blocks that learn it together."""

import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from trained import layers

import layerwise as lw
from layerwise.core.activation import Activation
from layerwise.core.errors import UserError
from layerwise.core.learning import AnswerError, learn
from layerwise.core.reading.structure import Layer
from layerwise.core.rewriting.rotation import closest_pair, rotation
from layerwise.core.running.joint import _answered, _share
from layerwise.quantize.flatquant import FlatQuant, FlatQuantized, _kronecker, flatquant
from layerwise.quantize.rtn import rtn

ASSETS = os.environ.get("LAYERWISE_ASSETS", "")
QUICK = {"text": "builtin", "text_samples": 4, "length": 32, "samples": 8, "noise_floor": False}
GRID = {"bits": 4, "group": 60, "symmetric": True}
INT4 = Activation("int4")


def problem(rows=20, width=60, loud=20.0):
    noise = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, width, generator=noise)
    inputs[:, width // 3] *= loud
    return torch.randn(rows, width, generator=noise), inputs


def seen(inputs):
    return inputs.T @ inputs / len(inputs), inputs.abs().amax(dim=0)


def plain(layer):
    """Make the transform of a layer the identity, and keep all of every range."""
    with torch.no_grad():
        own = layer.transform
        own.left.copy_(torch.eye(len(own.left)))
        own.right.copy_(torch.eye(len(own.right)))
        own.diagonal.zero_()
        own.share.fill_(torch.inf)
        layer.clip.fill_(torch.inf)


@pytest.mark.parametrize("width", [1, 7, 30, 64, 96])
def test_two_small_products_are_one_with_the_kronecker_product(width):
    # 30 is 2 mod 4, and 7 a prime.
    noise = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=noise) for size in closest_pair(width))
    rows = torch.randn(9, width, generator=noise)
    torch.testing.assert_close(_kronecker(rows, left, right), rows @ torch.kron(left, right))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [60, 16])
def test_without_transform_and_clipping_it_is_rounding_to_nearest(symmetric, group):
    weight, inputs = problem()
    grid = {"bits": 4, "group": group, "symmetric": symmetric}
    layer = FlatQuant(weight, peak=inputs.abs().amax(dim=0), **grid)
    plain(layer)
    made, nearest = layer.coded(), rtn(weight, **grid).with_activation(INT4)
    assert torch.equal(made.flat.codes, nearest.codes)
    assert torch.equal(made.dequantize(), nearest.dequantize())
    assert torch.equal(made.answer(inputs), nearest.answer(inputs))


@pytest.mark.parametrize("width", [64, 30, 7])
def test_without_rounding_it_is_the_layer(width):
    weight, inputs = problem(width=width)
    given = seen(inputs)
    made = flatquant(weight, *given, bits=16, group=width, symmetric=True, steps=20)
    torch.testing.assert_close(made.dequantize(), weight, rtol=1e-3, atol=2e-3)
    answered = replace(made, activation=None).answer(inputs)
    torch.testing.assert_close(answered, inputs @ weight.T, rtol=1e-3, atol=2e-2)


def test_the_inverse_is_that_of_what_is_stored():
    weight, inputs = problem()
    made = flatquant(weight, *seen(inputs), **GRID, steps=30)
    for factor in (made.left, made.right):
        exact = factor.float()
        assert not torch.allclose(exact @ exact.T, torch.eye(len(exact)), atol=1e-2)  # was learned
        inverse = torch.linalg.inv(exact.double()).float()
        torch.testing.assert_close(exact @ inverse, torch.eye(len(exact)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 10])
def test_answers_as_the_definition_does(bits):
    weight, inputs = problem()
    inputs = inputs[:40]
    layer = FlatQuant(weight, peak=inputs.abs().amax(dim=0), **GRID | {"bits": bits}, seed=3)
    made = layer.coded()
    diagonal, share = made.diagonal.double(), float(made.share)
    full = diagonal[:, None] * torch.kron(made.left.double(), made.right.double())
    there = inputs.double() @ full
    undone = weight.double() @ torch.linalg.inv(full).T
    top, clip = 2**bits - 1, 1.0 if bits >= 8 else float(torch.tensor(4.0).sigmoid())
    expected = torch.zeros(len(inputs), len(weight)).double()
    for row, values in enumerate(undone):
        wide = (2 * clip * values.abs().max() / top).float()
        step = ((wide.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32).double()
        middle = 2 ** (bits - 1)
        codes = ((values / step).round() + middle).clamp(0, top) - middle
        torch.testing.assert_close(
            made.flat.codes[row].double() - middle, codes, rtol=0, atol=1 if bits > 8 else 0
        )
        for token, entries in enumerate(there):
            unit = share * entries.abs().max() / 7
            expected[token, row] = step * unit * ((entries / unit).round().clamp(-8, 7) @ codes)
    answered = made.answer(inputs).double()
    assert (answered - expected).norm() < 1e-2 * expected.norm()


def test_the_diagonal_starts_from_the_largest_weights_and_inputs():
    weight, inputs = problem()
    peak = inputs.abs().amax(dim=0)
    made = FlatQuant(weight, peak=peak, **GRID).coded()
    start = torch.tensor(
        [float(weight[:, j].abs().max()) ** 0.7 / float(peak[j]) ** 0.3 for j in range(60)]
    )
    ratio = made.diagonal.float() / start
    torch.testing.assert_close(ratio, ratio[:1].expand(60), rtol=1e-2, atol=0)


@pytest.mark.parametrize("bits", [3, 10])
def test_the_codes_are_those_of_the_weight_that_was_learned(bits):
    weight, inputs = problem()
    gram, peak = seen(inputs)
    layer = FlatQuant(weight, peak=peak, bits=bits, group=16, steps=10)
    learn([layer], AnswerError(layer, weight, gram))
    assert torch.equal(layer.coded().dequantize(), layer.weight().detach())
    learned = layer.answering()(inputs).detach()
    torch.testing.assert_close(layer.coded().answer(inputs), learned, rtol=1e-4, atol=1e-3)


def test_everything_that_is_learned_gets_a_gradient():
    weight, inputs = problem()
    layer = FlatQuant(weight, peak=inputs.abs().amax(dim=0), **GRID)
    with torch.enable_grad():
        (layer.answering()(inputs) - inputs @ weight.T).square().mean().backward()
    for tensors in layer.parameters().values():
        for tensor in tensors:
            assert tensor.grad is not None
            assert bool(tensor.grad.isfinite().all())
            assert float(tensor.grad.abs().sum()) > 0


def test_rounding_passes_gradients_on_as_they_come():
    weight, inputs = problem(rows=4, width=6)
    layer = FlatQuant(weight, peak=inputs.abs().amax(dim=0), bits=4, group=6, symmetric=True)
    plain(layer)
    inputs = inputs[:3].requires_grad_()
    codes = layer.coded().flat.grid_values()
    with torch.enable_grad():
        layer.answering()(inputs).sum().backward()
    # The largest entry of a token sets its step, too; all others pass the gradient on.
    small = inputs.abs() < inputs.abs().amax(dim=1, keepdim=True)
    expected = codes.sum(dim=0).expand(3, 6)
    torch.testing.assert_close(inputs.grad[small], expected[small], rtol=1e-4, atol=1e-5)


def test_learning_lowers_the_error_of_what_the_layer_answers():
    weight, inputs = problem(width=64)
    gram, peak = seen(inputs)
    grid = GRID | {"group": 64}

    def lost(made):
        return float((made.answer(inputs) - inputs @ weight.T).square().sum())

    nearest = lost(rtn(weight, **grid).with_activation(INT4))
    start = lost(flatquant(weight, gram, peak, **grid, steps=0))
    learned = lost(flatquant(weight, gram, peak, **grid, steps=100))
    assert learned < start < nearest
    assert learned < 0.5 * nearest


def test_layers_that_read_one_input_learn_one_transform():
    weight, inputs = problem()
    peak = inputs.abs().amax(dim=0)
    first, second = (FlatQuant(part, peak=peak, **GRID) for part in (weight, 3 * weight.roll(1, 1)))
    first.share([second])
    stacked = FlatQuant(torch.cat([weight, 3 * weight.roll(1, 1)]), peak=peak, **GRID)
    assert second.transform is first.transform
    assert torch.equal(first.transform.diagonal, stacked.transform.diagonal)
    codes = torch.cat([first.coded().flat.codes, second.coded().flat.codes])
    assert torch.equal(codes, stacked.coded().flat.codes)
    learned = learned_parameters([first, second])
    assert len(learned) == len({id(one) for one in learned}) + 4  # the four that they share


def learned_parameters(learning):
    return [t for one in learning for tensors in one.parameters().values() for t in tensors]


def test_a_factor_that_gets_singular_is_put_right():
    weight, inputs = problem()
    layer = FlatQuant(weight, peak=inputs.abs().amax(dim=0), **GRID)
    with torch.no_grad():
        layer.transform.left[0] = layer.transform.left[1]
    layer.settle()
    least = torch.linalg.svdvals(layer.transform.left.detach())[-1]
    assert float(least) == pytest.approx(0.01, rel=1e-3)
    assert bool(layer.coded().dequantize().isfinite().all())


@pytest.mark.parametrize(
    ("width", "bits", "group"), [(60, 4, 16), (30, 3, 30), (7, 10, 3), (1, 4, 1)]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_stored_is_read_again(width, bits, group, symmetric):
    weight, inputs = problem(width=width)
    grid = {"bits": bits, "group": group, "symmetric": symmetric}
    told = {**grid, "codes": "own"}
    made = flatquant(weight, *seen(inputs), **grid, steps=3)
    parts, layout = made.parts(told), FlatQuantized.layout(20, width, told)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == dict(layout)
    again = FlatQuantized.read(parts, 20, width, told)
    assert torch.equal(again.grid_values(), made.grid_values())
    assert torch.equal(again.with_activation(INT4).answer(inputs), made.answer(inputs))
    own = sum(parts[name].numel() * 16 for name in ("left", "right", "diagonal", "share"))
    assert made.bits_per_weight() == made.flat.bits_per_weight() + own / weight.numel()


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_a_dead_input_and_a_ragged_group(rows, dtype):
    weight, inputs = problem(rows=rows)
    inputs[:, 5], weight[:, 9] = 0.0, 0.0
    made = flatquant(weight.to(dtype), *seen(inputs), bits=4, group=16, symmetric=False, steps=10)
    error = made.answer(inputs) - inputs @ weight.T
    assert float(error.norm()) < 0.3 * float((inputs @ weight.T).norm())


def test_a_layer_of_zeros_and_an_input_that_nothing_reached():
    weight, inputs = problem()
    zero = flatquant(torch.zeros_like(weight), *seen(inputs), **GRID, steps=5)
    assert not zero.dequantize().any()
    assert not zero.answer(inputs).any()
    unseen = flatquant(weight, torch.zeros(60, 60), torch.zeros(60), **GRID, steps=5)
    assert float((unseen.dequantize() - weight).norm()) < 0.3 * float(weight.norm())
    assert not unseen.answer(torch.zeros(3, 60)).any()


def test_nonsense_is_refused():
    weight, inputs = problem()
    for wrong, said in (({"steps": -1}, "steps is -1"), ({"batch": 0}, "batch is 0")):
        with pytest.raises(UserError, match=said):
            flatquant(weight, *seen(inputs), **GRID, **wrong)
    gram, peak = seen(inputs)
    with pytest.raises(UserError, match="NaN"):
        flatquant(weight, gram, peak.fill_(torch.nan), **GRID)


def test_a_block_is_learned_together_and_the_loaded_model_answers_as_in_memory(llama, tmp_path):
    asked = {"bits": 4, "group": 0, "symmetric": True, "calibration": "builtin", "cache": False}
    steps = {"options": {"quantize/flatquant": {"steps": 16, "batch": 4}}}
    nearest = lw.compress(llama, tmp_path / "rtn", activation="int4", **asked, **QUICK)
    asked |= {"method": "flatquant"}
    one = lw.compress(llama, tmp_path / "one", **asked, **steps, **QUICK)
    assert one.format == "layerwise"
    assert one.proof.largest_difference <= one.proof.allowed
    assert one.comparison.kl < nearest.comparison.kl
    stored = {}
    for file in (tmp_path / "one").glob("*.safetensors"):
        stored |= load_file(file)
    read = [stored[f"model.layers.0.self_attn.{name}_proj.left"] for name in "qkvo"]
    assert torch.equal(read[0], read[1])
    assert torch.equal(read[0], read[2])
    assert not torch.equal(read[0], read[3])


def test_a_learned_block_sees_inputs_that_are_rounded():
    weight, inputs = problem()
    places = [Layer(n, n, None, 20, 60, "linear", "", n, "one", "", "") for n in ("up", "gate")]
    learning = [
        FlatQuant(part, peak=inputs.abs().amax(dim=0), **GRID) for part in (weight, -weight)
    ]
    _share(places, learning)
    bias = torch.arange(20.0)

    def block(hidden, tensors):
        gate = functional.linear(hidden, tensors["gate"])
        return gate + functional.linear(hidden, tensors["up"], bias)

    given = {one.name: own.stand_in() for one, own in zip(places, learning, strict=True)}
    with torch.enable_grad():
        made = _answered(block, places, learning)(inputs.reshape(3, 100, 60), given)
        made.square().mean().backward()
    up, gate = (own.coded().answer(inputs) for own in learning)
    expected = (gate + up + bias).reshape(3, 100, 20)
    torch.testing.assert_close(made.detach(), expected, rtol=1e-4, atol=1e-3)
    assert learning[0].transform is learning[1].transform
    assert learning[0].transform.left.grad.abs().sum() > 0


@pytest.mark.trained
@pytest.mark.parametrize(("outliers", "most"), [(1.0, 0.85), (30.0, 0.1)])
@pytest.mark.parametrize("role", ["q_proj", "gate_proj", "down_proj"])
def test_a_trained_layer_alone_loses_less_than_behind_a_fixed_hadamard_matrix(outliers, most, role):
    seen = next(one for one in layers(outliers) if one.layer.name.endswith(role))
    weight, inputs = seen.weight, seen.inputs
    width = weight.shape[1]
    grid = {"bits": 4, "group": width, "symmetric": True}
    turn = rotation("hadamard", width)
    turned = rtn(turn.apply(weight), **grid).with_activation(INT4).answer(turn.apply(inputs))
    learned = flatquant(weight, seen.evidence["gram"], seen.evidence["peak"], **grid)
    wanted = inputs @ weight.T
    hadamard, flat = ((made - wanted).norm() ** 2 for made in (turned, learned.answer(inputs)))
    assert flat < most * hadamard
