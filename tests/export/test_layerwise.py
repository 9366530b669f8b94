"""layerwise's own format: what is loaded is what was in memory, at the size that was foreseen."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.packing import pack_bits, unpack_bits
from layerwise.core.reading.checkpoint import open_checkpoint
from layerwise.export.layerwise import VERSION, Layerwise

TEXT = torch.arange(8 * 32).remainder(256).reshape(8, 32)
PLANS = {
    "codes": {"bits": 3, "group": 16},
    "symmetric codes": {"bits": 5, "group": 0, "symmetric": True},
    "wide codes": {"bits": 12, "group": 16},
    "survivors": {"density": 0.3},
    "coded survivors": {"bits": 4, "group": 16, "density": 0.55},
    "symmetric coded survivors": {"bits": 2, "group": 32, "symmetric": True, "density": 0.5},
    "factors": {"rank": 3},
    "codes and factors": {"bits": 2, "group": 16, "rank": 4},
    "survivors and factors": {"density": 0.4, "rank": 2},
    "floats": {"bits": 8, "group": 16, "method": "fp8"},
    "surviving floats": {"bits": 8, "group": 0, "method": "fp8", "density": 0.4},
    "floats with zero points": {"bits": 8, "group": 32, "method": "fp8", "symmetric": False},
    "all": {"bits": 3, "group": 16, "density": 0.5, "rank": 2},
}


@pytest.mark.parametrize("wish", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_is_loaded_is_what_was_in_memory(make_llama, tmp_path, wish, dtype):
    model = make_llama(tmp_path / "model", dtype=dtype)
    texts = {"text": TEXT, "length": 32, "text_samples": 8}
    report = lw.compress(model, tmp_path / "out", **wish, **texts, format="layerwise")
    assert report.proof is not None
    assert report.proof.largest_difference <= report.proof.allowed
    assert (tmp_path / "out" / "layerwise.safetensors").stat().st_size == report.bytes_after


def test_by_tensor_and_by_block_write_the_same(llama, tmp_path):
    wish = {**PLANS["all"], "format": "layerwise"}
    lw.compress(llama, tmp_path / "streamed", **wish, proof="none")
    lw.compress(llama, tmp_path / "walked", **wish, text=TEXT, length=32, text_samples=8)
    files = [tmp_path / name / "layerwise.safetensors" for name in ("streamed", "walked")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_scales_that_moved_into_the_feeder(llama, text, tmp_path):
    report = lw.compress(
        llama,
        tmp_path / "out",
        bits=3,
        group=16,
        method="awq",
        rank=2,
        format="layerwise",
        calibration=str(text),
        samples=8,
        length=32,
        text_samples=4,
    )
    assert report.proof is not None


def test_it_is_as_small_as_it_says(llama, tmp_path):
    whole = lw.compress(llama, tmp_path / "a", density=0.25, format="layerwise", proof="none")
    dense = lw.compress(llama, tmp_path / "b", density=0.25, proof="none")
    layers = [layer for layer in lw.open(llama).structure.layers.values()]
    values = 4 * sum(int(0.25 * layer.count) + layer.rows for layer in layers)
    masks = sum(layer.rows * -(-layer.width // 8) for layer in layers)
    saved = 4 * sum(layer.count for layer in layers) - values - masks
    assert dense.bytes_after - whole.bytes_after == pytest.approx(saved, abs=4000)  # the header


def test_transformers_does_not_load_noise(llama, tmp_path):
    lw.compress(llama, tmp_path / "out", bits=4, group=16, format="layerwise", proof="none")
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_load_gives_a_transformers_model(llama, tmp_path):
    lw.compress(llama, tmp_path / "out", bits=8, group=16, format="layerwise", proof="none")
    model, original = lw.load(tmp_path / "out"), lw.load(llama)
    assert type(model) is type(original)
    with torch.no_grad():
        found, expected = model(TEXT).logits, original(TEXT).logits
    assert 0 < float((found - expected).norm()) < 0.02 * float(expected.norm())
    assert (
        next(lw.load(tmp_path / "out", dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16
    )


def test_a_later_version_is_refused(llama, tmp_path):
    out = tmp_path / "out"
    lw.compress(llama, out, bits=4, group=16, format="layerwise", proof="none")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["version"] = VERSION + 1
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"version {VERSION + 1}"):
        lw.load(out)


def test_a_model_in_memory(tmp_path):
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 16)
    )
    images = torch.randn(16, 3, 8, 8)
    wish = {"bits": 3, "group": 0, "density": 0.5, "rank": 2, "format": "layerwise"}
    report = lw.compress(module, tmp_path / "out", **wish, calibration=images)
    assert report.proof is not None
    state = Layerwise(open_checkpoint(tmp_path / "out")).read()
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in module.state_dict().items()
    }


@pytest.mark.parametrize("width", [1, 7, 8, 9, 64])
def test_bit_i_of_a_byte_is_its_entry_i(width):
    mask = torch.rand(5, width, generator=torch.Generator().manual_seed(width)) > 0.5
    packed = pack_bits(mask)
    for row, column in torch.cartesian_prod(torch.arange(5), torch.arange(width)).tolist():
        assert bool(packed[row, column // 8] >> (column % 8) & 1) == bool(mask[row, column])
    assert unpack_bits(packed, width).equal(mask)
