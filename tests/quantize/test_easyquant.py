import math
import os

import pytest
import torch

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.plan import LayerPlan
from layerwise.core.results import Quantized
from layerwise.quantize._grid import storable
from layerwise.quantize.easyquant import easyquant

ASSETS = os.environ.get("LAYERWISE_ASSETS", "")


def tailed(rows=24, width=160):
    weight = torch.randn(rows, width) / 10
    weight[torch.rand(rows, width) < 0.003] *= 8
    return weight


def error(weight, quantized):
    return float((quantized.dequantize() - weight).square().sum())


def test_without_outliers_and_steps_it_rounds_each_row_by_its_largest_weight():
    weight = tailed()
    made = easyquant(weight, bits=4, sigmas=math.inf, steps=0)
    for row, ours, scale in zip(weight, made.dequantize(), made.scale, strict=True):
        step = float(storable(row.abs().max() / 7))
        assert float(scale[0]) == step
        theirs = torch.tensor(
            [max(-7, min(7, round(value / step))) * step for value in row.tolist()]
        )
        torch.testing.assert_close(ours, theirs)
    assert made.outliers is not None
    assert not len(made.outliers.columns)


def test_outliers_are_those_beyond_n_deviations_of_the_layer():
    weight = tailed()
    made = easyquant(weight, bits=4, sigmas=3.5, outliers=0.05)
    values = weight.flatten().tolist()
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    rows = [
        [column for column, value in enumerate(row) if abs(value - mean) > 3.5 * deviation]
        for row in weight.tolist()
    ]
    assert made.outliers is not None
    assert made.outliers.counts.tolist() == [len(row) for row in rows]
    assert made.outliers.columns.tolist() == [column for row in rows for column in row]
    kept = (weight - mean).abs() > 3.5 * deviation
    assert made.dequantize()[kept].equal(weight.bfloat16().float()[kept])


def test_the_slope_is_that_of_the_error():
    row = torch.randn(300, dtype=torch.float64)
    scale = 0.31
    codes = (row / scale).round().clamp(-7, 7)
    slope = 2 * ((codes * scale - row) * codes).sum()
    ends = [((codes * at - row) ** 2).sum() for at in (scale - 1e-6, scale + 1e-6)]
    torch.testing.assert_close(slope, (ends[1] - ends[0]) / 2e-6, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_steps_come_near_the_best_of_all_scales(bits):
    weight = torch.randn(6, 200)
    made = easyquant(weight, bits=bits, outliers=0.0)
    top = 2 ** (bits - 1) - 1
    for row, ours in zip(weight, made.dequantize(), strict=True):
        tried = [
            float((((row / s).round().clamp(-top, top) * s - row) ** 2).sum())
            for s in torch.linspace(0.2, 1.0, 400) * row.abs().max() / top
        ]
        assert float((ours - row).square().sum()) < 1.1 * min(tried)


@pytest.mark.parametrize("symmetric", [True, False])
def test_steps_never_raise_the_error(symmetric):
    weight = tailed()
    for bits in (2, 3, 4, 8):
        asked = {"bits": bits, "symmetric": symmetric, "group": 32}
        errors = [error(weight, easyquant(weight, steps=n, **asked)) for n in (0, 5, 50, 200)]
        assert errors == sorted(errors, reverse=True)


def test_both_parts_help_where_tails_are_heavy():
    weight = tailed()
    plain, isolated, narrowed, both = (
        error(weight, easyquant(weight, bits=3, outliers=outliers, steps=steps))
        for outliers, steps in ((0.0, 0), (0.01, 0), (0.0, 200), (0.01, 200))
    )
    assert both < min(isolated, narrowed)
    assert max(isolated, narrowed) < plain


def test_where_there_is_no_room_the_farthest_are_kept():
    weight = torch.randn(10, 100).clamp(-1, 1)
    weight[:, ::10] = torch.arange(100.0).reshape(10, 10) + 50
    made = easyquant(weight, bits=4, outliers=0.01, sigmas=2.0)
    assert made.outliers is not None
    assert sorted(made.outliers.values.tolist()) == [
        float(value.bfloat16()) for value in torch.arange(140.0, 150.0)
    ]
    (note,) = made.notes
    assert "no room" in note


def test_a_row_of_outliers_alone_keeps_them():
    weight = torch.randn(200, 64) / 1000
    weight[3] = 5.0
    made = easyquant(weight, bits=3, outliers=0.01)
    assert made.dequantize()[3].eq(5.0).all()
    assert made.dequantize().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(dtype):
    weight = tailed().to(dtype)
    ours, theirs = easyquant(weight, bits=4), easyquant(weight.float(), bits=4)
    assert ours.dequantize().equal(theirs.dequantize())


@pytest.mark.parametrize("shape", [(1, 64), (5, 61), (48, 1)])
def test_any_shape_will_do(shape):
    weight = torch.randn(shape)
    made = easyquant(weight, bits=8, group=16)
    assert error(weight, made) < 1e-3 * float(weight.square().sum())


def test_a_constant_layer_has_no_outliers():
    made = easyquant(torch.full((16, 32), 0.3), bits=4)
    assert made.outliers is not None
    assert not len(made.outliers.columns)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_stored_is_read_back(symmetric):
    weight = tailed()
    made = easyquant(weight, bits=3, group=32, symmetric=symmetric)
    told = LayerPlan(3, 32, symmetric, "easyquant").told({})
    layout = Quantized.layout(24, 160, told)
    parts = made.parts(told)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == dict(layout)
    assert Quantized.read(parts, 24, 160, told).grid_values().equal(made.grid_values())


@pytest.mark.parametrize(
    "options", [{"bits": 9}, {"outliers": 1.0}, {"sigmas": 0.0}, {"steps": -1}, {"rate": math.inf}]
)
def test_refuses_nonsense(options):
    with pytest.raises(UserError, match=next(iter(options))):
        easyquant(tailed(), **{"bits": 4} | options)


def test_a_model_is_written_and_read_back(llama, tmp_path):
    report = lw.compress(
        llama, tmp_path / "out", bits=3, method="easyquant", format="layerwise", text="builtin",
        text_samples=2, length=32, noise_floor=False,
    )  # fmt: skip
    assert report.proof is not None
    # Rows, without zero points: what the method does by itself.
    assert {row.stored_bits < 5 for row in report.layers} == {True}


@pytest.mark.trained
def test_both_parts_lower_the_error_of_a_trained_model():
    source = lw.open(f"{ASSETS}/models/bytes-wikitext")
    totals = torch.zeros(4)
    for layer in source.structure.layers.values():
        weight = layer.read(source.source).float()
        whole = float(weight.square().sum())
        for place, (outliers, steps) in enumerate(((0.0, 0), (0.01, 0), (0.0, 200), (0.01, 200))):
            made = easyquant(weight, bits=3, outliers=outliers, steps=steps)
            totals[place] += error(weight, made) / whole
    plain, isolated, narrowed, both = (totals / len(source.structure.layers)).tolist()
    assert both < 0.6 * plain
    assert both < min(isolated, narrowed)
    assert max(isolated, narrowed) < plain
