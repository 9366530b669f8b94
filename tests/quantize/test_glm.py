import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.packing import pack, unpack
from layerwise.core.plan import LayerPlan
from layerwise.core.results import Quantized
from layerwise.quantize._grid import storable
from layerwise.quantize.glm import glm

ASSETS = os.environ.get("LAYERWISE_ASSETS", "")


@pytest.mark.parametrize(("bits", "top"), [(4, 7), (8, 127)])
def test_matches_the_recipe_row_by_row(bits, top):
    weight = torch.randn(6, 50)
    for row, ours in zip(weight, glm(weight, bits=bits).dequantize(), strict=True):
        scale = float(storable(row.abs().max() / top))
        codes = [max(-top, min(top, round(value / scale))) for value in row.tolist()]
        torch.testing.assert_close(ours, torch.tensor([code * scale for code in codes]))


def test_a_row_has_one_scale_unless_a_group_is_given():
    weight = torch.randn(6, 64)
    assert glm(weight).scale.shape == (6, 1)
    assert glm(weight, group=16).scale.shape == (6, 4)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_lowest_code_is_never_used(bits):
    weight = torch.randn(16, 64)
    weight[:, 0] = 1.0 - 2 ** (bits - 1)
    made = glm(weight, bits=bits)
    assert int(made.codes.min()) == 1
    assert made.symmetric


def test_a_row_on_its_grid_stays_there():
    weight = torch.arange(-7.0, 8.0)[None] * torch.tensor([[0.25], [3.0], [2.0**-20]])
    assert glm(weight).dequantize().equal(weight)


def test_all_fifteen_codes_survive_packing():
    codes = torch.arange(1, 16)[None]
    assert unpack(pack(codes, 4), 4, 15).equal(codes.int())


def test_rows_too_small_for_float16_are_kept():
    weight = torch.randn(4, 32) * 1e-12
    error = (glm(weight, bits=8).dequantize() - weight).abs()
    assert float(error.max() / weight.abs().max()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(dtype):
    weight = torch.randn(8, 64).to(dtype)
    assert glm(weight).dequantize().equal(glm(weight.float()).dequantize())


@pytest.mark.parametrize("shape", [(1, 64), (5, 61), (48, 1)])
def test_any_shape_will_do(shape):
    weight = torch.randn(shape)
    error = glm(weight, bits=8, group=16).dequantize() - weight
    assert float(error.abs().max()) < 0.02 * float(weight.abs().max())


def test_zeros_stay_zeros():
    weight = torch.randn(4, 32)
    weight[2], weight[:, 5] = 0.0, 0.0
    restored = glm(weight).dequantize()
    assert not restored[2].any()
    assert not restored[:, 5].any()


@pytest.mark.parametrize("bits", [1, 3, 16])
def test_has_no_other_width(bits):
    with pytest.raises(UserError, match="4 or 8"):
        glm(torch.randn(4, 8), bits=bits)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_stored_is_read_back(symmetric):
    weight = torch.randn(24, 96)
    made = glm(weight, symmetric=symmetric)
    told = LayerPlan(4, 0, symmetric, "glm").told({})
    parts = made.parts(told)
    assert Quantized.read(parts, 24, 96, told).grid_values().equal(made.grid_values())


def test_a_wish_without_a_group_gets_rows_without_zero_points(llama):
    plan = lw.plan(llama, bits=4, method="glm")
    assert {(one.group, one.symmetric) for one in plan.layers.values()} == {(0, True)}


def _loss(path, bits, tmp_path, round_matrix):
    """Excess cross-entropy of a model whose block matrices were rounded by hand."""
    folder = tmp_path / f"{bits}"
    folder.mkdir()
    tensors = load_file(f"{path}/model.safetensors")
    for name in lw.open(path).structure.layers:
        tensors[f"{name}.weight"] = round_matrix(tensors[f"{name}.weight"].float())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for file in ("config.json", "generation_config.json"):
        (folder / file).write_text((Path(path) / file).read_text())
    assert json.loads((folder / "config.json").read_text())
    text = f"{ASSETS}/text/wikitext2/test.txt"
    seen = lw.evaluate(str(folder), against=path, text=text, samples=128, length=64).text
    return seen.perplexity, seen.perplexity_before


@pytest.mark.trained
def test_a_scale_for_each_row_halves_what_one_for_all_loses(tmp_path):
    path = f"{ASSETS}/models/bytes-wikitext"

    def of_all(matrix):
        return glm(matrix.reshape(1, -1), bits=4).dequantize().reshape(matrix.shape)

    one, before = _loss(path, 4, tmp_path, of_all)
    (tmp_path / "rows").mkdir()
    rows, _ = _loss(path, 4, tmp_path / "rows", lambda matrix: glm(matrix, bits=4).dequantize())
    assert rows - before <= 0.5 * (one - before)


@pytest.mark.trained
def test_eight_bits_move_the_perplexity_by_less_than_a_thousandth(tmp_path):
    path = f"{ASSETS}/models/bytes-wikitext"
    after, before = _loss(path, 8, tmp_path, lambda matrix: glm(matrix, bits=8).dequantize())
    assert abs(after - before) / before <= 0.001
