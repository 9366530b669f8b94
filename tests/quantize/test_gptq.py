import pytest
import torch

from layerwise.core.errors import UserError
from layerwise.quantize import _feedback as module
from layerwise.quantize._grid import fit
from layerwise.quantize.gptq import gptq
from layerwise.quantize.rtn import rtn


def problem(rows=20, width=96, seed=0):
    noise = torch.Generator().manual_seed(seed)
    mixing = torch.eye(width) + torch.randn(width, width, generator=noise) / 10
    inputs = torch.randn(3 * width, width, generator=noise) @ mixing
    return torch.randn(rows, width, generator=noise), inputs.T @ inputs / len(inputs)


def damped(gram, damping=0.01):
    return gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram))


def by_definition(weight, gram, bits, group):
    """Algorithm 1 as printed, one column at a time, in float64, with the inverse."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram)))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left = weight.double()
    rounded = torch.zeros_like(left)
    for j in range(left.shape[1]):
        if j % group == 0:
            scale, zero = fit(left[:, j : j + group].float(), bits, symmetric=False)
        code = ((left[:, j] / scale).round() + zero).clamp(0, 2**bits - 1)
        rounded[:, j] = (code - zero) * scale.double()
        error = (left[:, j] - rounded[:, j]) / factor[j, j]
        left[:, j:] -= error[:, None] * factor[j, j:]
    return rounded


def loss(rounded, weight, gram):
    error = rounded.double() - weight.double()
    return float((error @ gram.double() * error).sum())


@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, 40), (4, 96), (4, 7)])
def test_matches_algorithm_1(bits, group):
    weight, gram = problem()
    ours = gptq(weight, gram, bits=bits, group=group, clips=1).dequantize()
    torch.testing.assert_close(ours.double(), by_definition(weight, gram, bits, group))


@pytest.mark.parametrize("few", [1, 8, 16])
@pytest.mark.parametrize("group", [16, 24, 96])
def test_how_columns_are_halved_changes_nothing(few, group, monkeypatch):
    weight, gram = problem()
    whole = gptq(weight, gram, bits=3, group=group).dequantize()
    monkeypatch.setattr(module, "_FEW", few)
    torch.testing.assert_close(gptq(weight, gram, bits=3, group=group).dequantize(), whole)


def test_uncorrelated_inputs_leave_nothing_to_absorb_errors():
    weight, gram = problem()
    alone = gram.diagonal().diag()
    for act_order in (False, True):
        ours = gptq(weight, alone, bits=3, group=32, clips=1, act_order=act_order)
        assert ours.codes.equal(rtn(weight, bits=3, group=32).codes)


def test_columns_that_already_come_by_energy_are_taken_as_they_come():
    weight, gram = problem()
    order = gram.diagonal().argsort(descending=True)
    weight, gram = weight[:, order].contiguous(), gram[order][:, order]
    ours, theirs = (
        gptq(weight, gram, bits=3, group=96, act_order=act_order) for act_order in (False, True)
    )
    assert ours.codes.equal(theirs.codes)


def test_the_loss_left_is_the_sum_of_squared_scaled_errors():
    weight, gram = problem()
    rounded = gptq(weight, gram, bits=3, group=32).dequantize().double()
    # With H = R R^T the loss is |(Q - W) R|^2, and its columns are the e_j of equation 2.
    lower = torch.linalg.cholesky(damped(gram).flip(0, 1))
    scaled = (rounded - weight) @ lower.flip(0, 1)
    torch.testing.assert_close(
        scaled.square().sum(), torch.tensor(loss(rounded, weight, damped(gram))).double()
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_halves_the_output_error_of_rounding(bits):
    weight, gram = problem(rows=64)
    plain = loss(rtn(weight, bits=bits, group=32).dequantize(), weight, gram)
    for act_order in (False, True):
        ours = gptq(weight, gram, bits=bits, group=32, act_order=act_order).dequantize()
        assert loss(ours, weight, gram) < 0.7 * plain


def test_rescaling_the_gram_matrix_changes_nothing():
    weight, gram = problem()
    assert gptq(weight, gram, bits=3).codes.equal(gptq(weight, 2**-30 * gram, bits=3).codes)


def test_a_weight_on_its_grid_stays_there():
    weight, gram = problem()
    # Codes 0 and 15 in every row, so that the grid of the result is the grid of the weight.
    weight[:, 0], weight[:, 1] = -4, 3.5
    weight = (2 * weight).round().clamp(-8, 7) / 2
    assert gptq(weight, gram, bits=4, group=96, clips=1).dequantize().equal(weight)


def test_an_input_that_was_never_seen_is_rounded_to_nearest():
    weight, gram = problem()
    gram[:, 5] = gram[5] = 0.0
    quantized = gptq(weight, gram, bits=4, group=1, clips=1)
    assert quantized.codes[:, 5].equal(rtn(weight, bits=4, group=1).codes[:, 5])
    assert quantized.notes == ("1 inputs were always zero; rounded to nearest",)


def test_no_calibration_at_all_is_rounding_to_nearest():
    weight, gram = problem()
    quantized = gptq(weight, torch.zeros_like(gram), bits=4, group=32, clips=1)
    assert quantized.codes.equal(rtn(weight, bits=4, group=32).codes)
    assert quantized.notes


def test_raised_damping_is_noted():
    weight, gram = problem()
    indefinite = gram - 0.05 * gram.diagonal().mean() * torch.eye(len(gram))
    assert "damping raised to 0.1" in gptq(weight, indefinite, bits=4).notes[0]


def test_dead_inputs_have_no_part_in_the_damping():
    weight, gram = problem(width=64)
    wide, padded = torch.zeros(20, 96), torch.zeros(96, 96)
    wide[:, :64], padded[:64, :64] = weight, gram
    ours = gptq(wide, padded, bits=3, group=32)
    assert ours.codes[:, :64].equal(gptq(weight, gram, bits=3, group=32).codes)


def test_refuses_a_gram_that_never_factors():
    weight, gram = problem()
    hollow = torch.full_like(gram, 1e12).fill_diagonal_(1.0)
    with pytest.raises(UserError, match="does not factor, even with damping 100000"):
        gptq(weight, hollow, bits=4)


@pytest.mark.parametrize("damping", [0.0, -1.0, torch.nan, torch.inf])
def test_refuses_damping_that_is_none(damping):
    with pytest.raises(UserError, match="damping"):
        gptq(*problem(), bits=4, damping=damping)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_refuses_statistics_that_are_no_numbers(value):
    weight, gram = problem()
    gram[3, 3] = value
    with pytest.raises(UserError, match="statistics"):
        gptq(weight, gram, bits=4)


def test_exact_products_do_not_depend_on_their_shape():
    noise = torch.Generator().manual_seed(0)
    share, missed = torch.randn(128, 300, generator=noise), torch.randn(128, 77, generator=noise)
    whole = module._exact_product(share, missed)
    torch.testing.assert_close(whole, share.T @ missed, rtol=1e-4, atol=1e-4)
    for rows in (1, 2, 5, 33, 76):
        assert module._exact_product(share, missed[:, :rows]).equal(whole[:, :rows])
