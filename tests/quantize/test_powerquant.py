import os

import pytest
import torch

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.plan import LayerPlan
from layerwise.core.results import Quantized
from layerwise.quantize._grid import storable
from layerwise.quantize._power import power_points
from layerwise.quantize.powerquant import powerquant

ASSETS = os.environ.get("LAYERWISE_ASSETS", "")


def at(weight, exponent, **options):
    return powerquant(weight, lowest=exponent, highest=exponent, **options)


def lost(weight, quantized):
    return float((quantized.dequantize() - weight).square().sum() / weight.square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("exponent", [0.3, 0.55, 1.0, 1.2])
def test_matches_the_equations(bits, exponent):
    weight = torch.randn(5, 40)
    made = at(weight, exponent, bits=bits)
    most = 2 ** (bits - 1) - 1
    for row, ours in zip(weight, made.dequantize().tolist(), strict=True):
        largest = float(storable(row.abs().max()))
        s = largest**exponent / most
        for value, restored in zip(row.tolist(), ours, strict=True):
            q = round(abs(value) ** exponent / s) * (1 if value > 0 else -1)
            theirs = (abs(q) * s) ** (1 / exponent) * (1 if q > 0 else -1)
            assert restored == pytest.approx(theirs, rel=1e-5, abs=1e-30)


def test_an_exponent_of_one_is_rounding_without_the_lowest_code():
    weight = torch.randn(8, 64)
    made = at(weight, 1.0, bits=4, group=16)
    scale = storable(weight.reshape(8, 4, 16).abs().amax(dim=2))
    whole = (weight.reshape(8, 4, 16) / scale[..., None] * 7).round()
    assert made.codes.equal((whole + 8).reshape(8, 64).to(torch.uint8))
    torch.testing.assert_close(made.dequantize(), (whole / 7 * scale[..., None]).reshape(8, 64))


def test_the_exponent_is_the_best_of_the_grid():
    weight = torch.randn(16, 128)
    made = powerquant(weight, bits=4)
    errors = {step: lost(weight, at(weight, step / 20, bits=4)) for step in range(4, 25)}
    best = min(errors, key=errors.__getitem__)
    assert made.notes == (f"exponent {best / 20:.3g}",)
    assert lost(weight, made) == pytest.approx(errors[best])
    assert best < 20


def test_heavy_tails_want_another_exponent_than_even_weights():
    even = torch.rand(16, 128) * 2 - 1
    tailed = torch.randn(16, 128) ** 3

    def exponent(weight):
        return float(powerquant(weight, bits=4).notes[0].removeprefix("exponent "))

    assert exponent(tailed) < 0.6 < 0.8 < exponent(even)


def test_norm_says_which_errors_count():
    weight = torch.randn(16, 128) ** 3
    assert powerquant(weight, bits=3, norm=1.0).notes != powerquant(weight, bits=3, norm=6.0).notes


def test_signs_and_zeros_are_kept():
    weight = torch.randn(8, 64)
    weight[weight.abs() < 0.3] = 0.0
    for exponent in (0.2, 0.7, 1.2):
        restored = at(weight, exponent, bits=8).dequantize()
        assert bool((restored[weight == 0] == 0).all())
        assert bool((restored * weight >= 0).all())


def test_eight_bits_lose_next_to_nothing():
    weight = torch.randn(8, 256)
    assert lost(weight, powerquant(weight, bits=8)) < 1e-4


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("exponent", [0.1, 0.5, 1.0])
def test_points_have_one_zero_and_are_signed_alike(bits, exponent):
    points = power_points(bits, exponent)
    assert int((points == 0).sum()) == 1
    assert points[2 ** (bits - 1)] == 0
    assert points[-1] == 1
    assert points[1:].equal(-points[1:].flip(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(dtype):
    weight = torch.randn(8, 64).to(dtype)
    assert (
        powerquant(weight, bits=4)
        .dequantize()
        .equal(powerquant(weight.float(), bits=4).dequantize())
    )


@pytest.mark.parametrize("shape", [(1, 64), (5, 61), (48, 1)])
def test_any_shape_will_do(shape):
    weight = torch.randn(shape)
    assert lost(weight, powerquant(weight, bits=6, group=16)) < 1e-2


def test_a_layer_of_zeros_stays_one():
    assert not powerquant(torch.zeros(4, 32), bits=3).dequantize().any()


def test_everything_stored_is_counted():
    weight = torch.randn(8, 64)
    for bits in (4, 8):
        made = powerquant(weight, bits=bits, group=32)
        stored = 8 * 64 * bits + 8 * 2 * 16 + 2**bits * 32
        assert made.bits_per_weight() == stored / (8 * 64)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 8])
def test_what_is_stored_is_read_back(bits, symmetric):
    weight = torch.randn(24, 96)
    made = powerquant(weight, bits=bits, group=32, symmetric=symmetric)
    told = LayerPlan(bits, 32, symmetric, "powerquant").told({})
    parts = made.parts(told)
    layout = Quantized.layout(24, 96, told)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == dict(layout)
    assert Quantized.read(parts, 24, 96, told).grid_values().equal(made.grid_values())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 9}, "bits"),
        ({"lowest": 0.0}, "exponents"),
        ({"highest": 0.1}, "exponents"),
        ({"step": 0.0}, "step"),
        ({"norm": 0.0}, "norm"),
    ],
)
def test_refuses_nonsense(options, says):
    with pytest.raises(UserError, match=says):
        powerquant(torch.randn(4, 8), **{"bits": 4} | options)


def test_a_model_is_written_and_read_back(llama, tmp_path):
    report = lw.compress(
        llama, tmp_path / "out", bits=3, method="powerquant", format="layerwise", text="builtin",
        text_samples=2, length=32, noise_floor=False,
    )  # fmt: skip
    assert report.proof is not None
    assert all("exponent" in row.notes[0] for row in report.layers)


@pytest.mark.trained
@pytest.mark.parametrize("bits", [3, 4])
def test_a_trained_model_loses_a_tenth_less_than_with_even_steps(bits):
    found = lw.open(f"{ASSETS}/models/bytes-wikitext")
    weights = [layer.read(found.source).float() for layer in found.structure.layers.values()]

    def mean(exponent):
        return sum(lost(weight, at(weight, exponent, bits=bits)) for weight in weights)

    searched = sum(lost(weight, powerquant(weight, bits=bits)) for weight in weights)
    one_for_all = {step / 20: mean(step / 20) for step in range(10, 21)}
    best = min(one_for_all, key=one_for_all.__getitem__)
    assert best < 1
    assert searched <= one_for_all[best] <= 0.9 * one_for_all[1.0]
