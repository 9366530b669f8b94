import itertools
import math

import pytest
import torch
from trained import layers

from layerwise.core.activation import Activation
from layerwise.core.errors import UserError
from layerwise.core.results import Quantized
from layerwise.quantize.fp4 import fp4
from layerwise.quantize.rtn import rtn

CONSTRAINTS = ("none", "m1", "m2")


def values():
    """E2M1 by its definition: a sign, two bits of exponent with a bias of 1, one of mantissa."""
    made = []
    for sign, exponent, mantissa in itertools.product(range(2), range(4), range(2)):
        size = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
        made.append(-size if sign else size)
    return torch.tensor(made)


def problem(rows=20, width=96):
    noise = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, width, generator=noise)
    inputs += inputs[:, :1] / 2
    return torch.randn(rows, width, generator=noise), inputs.T @ inputs / 300


def alone(width):
    """A gram matrix of inputs that have nothing to do with each other: no error can move."""
    return torch.eye(width)


def least_scale(largest):
    """max / 6, rounded up to bfloat16."""
    bits = torch.tensor(largest / 6).view(torch.int32)
    return float(((bits + 0xFFFF) & -0x10000).view(torch.float32))


def by_definition(weight, gram, group, constraint):
    """Column by column in float64, with scales from the formulas."""
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(len(gram))
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, rounded = weight.double(), torch.zeros_like(weight).double()
    rows, width = weight.shape
    most = [
        max(least_scale(float(row[g : g + group].abs().max())) for g in range(0, width, group))
        for row in weight
    ]
    scales = [1.0] * rows
    for j in range(width):
        for row in range(rows):
            if j % group == 0:
                scale = least_scale(float(left[row, j : j + group].abs().max()))
                if constraint == "m1":
                    scale = 2.0 ** math.ceil(math.log2(scale) - 1e-9)
                if constraint == "m2":
                    scale = most[row] / 2.0 ** math.floor(math.log2(most[row] / scale) + 1e-9)
                scales[row] = scale
            steps = values().double() * scales[row]
            rounded[row, j] = steps[(steps - left[row, j]).abs().argmin()]
        error = (left[:, j] - rounded[:, j]) / factor[j, j]
        left[:, j:] -= error[:, None] * factor[j, j:]
    return rounded


def test_points_are_those_of_the_format():
    weight, gram = problem()
    assert fp4(weight, gram).points.equal(values())
    assert len(values().unique()) == 15


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("group", [16, 40, 96])
def test_matches_the_definition(constraint, group):
    weight, gram = problem()
    ours = fp4(weight, gram, group=group, constraint=constraint).dequantize()
    torch.testing.assert_close(
        ours.double(), by_definition(weight, gram, group, constraint), rtol=0, atol=1e-5
    )


def test_a_weight_between_two_points_takes_the_even_code():
    halves = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -5.0]])
    ours = fp4(halves, alone(11), group=11)
    assert ours.codes.tolist() == [[0, 2, 2, 4, 4, 6, 6, 7, 0, 10, 14]]


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_a_weight_on_the_points_stays_there(constraint):
    noise = torch.Generator().manual_seed(0)
    weight = values()[torch.randint(16, (12, 64), generator=noise)]
    weight[:, ::32] = 6.0
    _, gram = problem(width=64)
    assert fp4(weight, gram, group=32, constraint=constraint).dequantize().equal(weight)


def test_scales_are_held_to_powers_of_two_and_never_cut_a_weight_off():
    noise = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=noise) * torch.logspace(-3, 3, 128)
    free, m1, m2 = (
        fp4(weight, alone(128), group=16, constraint=one).scale.float() for one in CONSTRAINTS
    )
    assert bool((m1.frexp().mantissa == 0.5).all())
    assert bool(((m2.amax(dim=1, keepdim=True) / m2).frexp().mantissa == 0.5).all())
    assert bool(((free <= m1) & (m1 < 2 * free) & (free <= m2) & (m2 < 2 * free)).all())
    assert m2.amax(dim=1).equal(free.amax(dim=1))


def test_scales_that_are_equal_already_are_left_alone():
    weight, _ = problem()
    weight[:, ::32] = 5.0
    free, m2 = (fp4(weight, alone(96), group=32, constraint=one) for one in ("none", "m2"))
    assert m2.scale.equal(free.scale)
    assert m2.codes.equal(free.codes)


def test_a_group_of_zeros_holds_no_other_to_its_scale():
    weight, _ = problem()
    weight = weight / 100
    with_zeros = torch.cat([torch.zeros(20, 32), weight], dim=1)
    ours = fp4(with_zeros, alone(128), group=32)
    assert ours.codes[:, 32:].equal(fp4(weight, alone(96), group=32).codes)
    assert not ours.dequantize()[:, :32].any()


@pytest.mark.parametrize("shape", [(1, 96), (20, 37), (20, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_awkward_layers_come_back_as_they_were_stored(shape, dtype):
    weight, gram = problem(*shape)
    ours = fp4(weight.to(dtype), gram, group=16)
    told = {"bits": 4, "group": 16, "symmetric": True, "codes": "points"}
    parts = ours.parts(told)
    layout = Quantized.layout(*shape, told)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == layout
    again = Quantized.read(parts, *shape, told)
    assert again.grid_values().equal(ours.grid_values())
    stored = sum(part.numel() * part.element_size() * 8 for part in parts.values())
    assert ours.bits_per_weight() <= stored / weight.numel()


def test_dead_inputs_are_rounded_to_nearest():
    weight, gram = problem()
    gram[5] = gram[:, 5] = 0.0
    ours = fp4(weight, gram, group=1, constraint="none")
    assert ours.notes == ("1 inputs were always zero; rounded to nearest",)
    torch.testing.assert_close(ours.dequantize()[:, 5], weight[:, 5], rtol=2**-7, atol=0)


@pytest.mark.parametrize("options", [{"bits": 8}, {"constraint": "m3"}, {"damping": 0.0}])
def test_refuses_what_it_does_not_have(options):
    with pytest.raises(UserError):
        fp4(*problem(), **options)


def weight_loss(made, weights):
    return sum(float((made(w).dequantize() - w).square().sum()) for w in weights)


@pytest.mark.trained
def test_on_a_trained_model_the_constraint_costs_little():
    """The card's claim on weights alone, groups of 64: M2 <= M1, M2 <= 1.15 of no constraint."""
    weights = [one.weight for one in layers()]
    free, m1, m2 = (
        weight_loss(lambda w, c=one: fp4(w, alone(w.shape[1]), group=64, constraint=c), weights)
        for one in CONSTRAINTS
    )
    assert m2 <= m1
    assert m2 <= 1.15 * free


@pytest.mark.trained
def test_on_a_trained_model_fp4_weights_are_nearer_than_symmetric_int4():
    weights = [one.weight for one in layers()]
    ours = weight_loss(lambda w: fp4(w, alone(w.shape[1]), group=128, constraint="none"), weights)
    assert ours <= weight_loss(lambda w: rtn(w, bits=4, group=128, symmetric=True), weights)


@pytest.mark.trained
def test_with_outliers_fp8_inputs_lose_a_fifth_of_what_int8_loses():
    lost = dict.fromkeys(("fp8", "int8"), 0.0)
    for one in layers(outliers=30.0):
        answer = one.inputs @ one.weight.T
        for scheme in lost:
            rounded = Activation.of(scheme, None).rounded(one.inputs) @ one.weight.T
            lost[scheme] += float((rounded - answer).square().sum() / answer.square().sum())
    assert lost["fp8"] <= 0.2 * lost["int8"]
