"""Packed codes against the package that unpacks them, and against the definition."""

import json
from typing import Any

import models
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from safetensors.torch import load_file

import layerwise as lw
from layerwise.core.activation import SCHEMES
from layerwise.core.packing import pack, unpack
from layerwise.core.plan import LayerPlan
from layerwise.core.reading.structure import structure
from layerwise.export.compressed_tensors import CompressedTensors

PACKED = "pack-quantized"
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)


def codes(rows: int, width: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 2**bits, (rows, width), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("width", [1, 31, 32, 96, 100])
def test_packs_as_the_package_does(bits, width):
    ours = codes(5, width, bits)
    signed = (ours.int() - 2 ** (bits - 1)).to(torch.int8)
    assert pack(ours, bits).equal(pack_to_int32(signed, bits))
    assert unpack_from_int32(pack(ours, bits), bits, torch.Size((5, width))).equal(signed)
    assert unpack(pack(ours, bits), bits, width).equal(ours.int())


@pytest.mark.parametrize("bits", WIDTHS)
def test_code_i_lies_at_bit_i_times_its_width(bits):
    ours = codes(1, 64, bits)
    words = pack(ours, bits)[0].tolist()
    number = sum((word & 0xFFFFFFFF) << (32 * position) for position, word in enumerate(words))
    for position, code in enumerate(ours[0].tolist()):
        assert number >> (bits * position) & (2**bits - 1) == code


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_from_pretrained_answers_as_the_result_in_memory(bits, llama, tmp_path):
    report = lw.compress(
        llama,
        tmp_path / "out",
        bits=bits,
        group=16,
        symmetric=True,
        length=32,
        text_samples=8,
        text=torch.randint(0, 256, (8, 32)),
        format="compressed-tensors",
    )
    assert report.proof is not None
    assert report.proof.largest_difference <= report.proof.allowed


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("method", "bits", "group"), [("rtn", 8, 0), ("rtn", 4, 16), ("fp8", 8, 0)]
)
def test_rounded_inputs_answer_as_in_memory(method, bits, group, scheme, llama, tmp_path):
    asked = {"method": method, "bits": bits, "group": group, "symmetric": True, "length": 32}
    asked |= {"text": "builtin", "text_samples": 4, "calibration": "builtin", "samples": 4}
    asked["format"] = "compressed-tensors"
    plain = lw.compress(llama, tmp_path / "plain", **asked)
    report = lw.compress(llama, tmp_path / "out", activation=scheme, **asked)
    assert report.proof.largest_difference <= report.proof.allowed
    assert report.comparison.kl != plain.comparison.kl
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (kind,) = {group["format"] for group in written["config_groups"].values()}
    whole = scheme.startswith("int8") and (bits, group) == (8, 0)
    assert kind == ("float-quantized" if method == "fp8" else "int-quantized" if whole else PACKED)


def test_mixed_widths_and_an_ignored_layer_load(llama, tmp_path):
    found = lw.open(llama).structure
    plan = lw.plan(llama, bits=4, group=16, symmetric=True, format="compressed-tensors")
    layers = dict(plan.layers)
    for name in layers:
        if name.endswith("down_proj"):
            layers[name] = LayerPlan(bits=8, group=0, symmetric=True)
        if "layers.1.self_attn" in name:
            layers[name] = LayerPlan()
    report = lw.compress(
        llama,
        tmp_path / "out",
        plan=type(plan)(layers, plan.format),
        length=32,
        text_samples=8,
        text=torch.randint(0, 256, (8, 32)),
    )
    assert report.proof is not None
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    ignored = {name for name in found.layers if "layers.1.self_attn" in name} | {"lm_head"}
    assert ignored <= set(config["ignore"])
    assert len(config["config_groups"]) == 2


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"bits": 12, "symmetric": True}, "12 bits"),
        ({"bits": 4, "symmetric": False}, "zero points"),
        ({"bits": 8, "symmetric": False, "method": "fp8"}, "zero points"),
    ],
)
def test_refuses_what_it_has_no_place_for(changes, problem, llama, tmp_path):
    with pytest.raises(lw.UserError, match=problem):
        lw.compress(
            llama, tmp_path / "out", group=16, format="compressed-tensors", proof="none", **changes
        )
    assert not list(tmp_path.iterdir())


FLOATS = {"method": "fp8", "bits": 8, "format": "compressed-tensors"}
TEXT = torch.arange(8 * 32).remainder(256).reshape(8, 32)
TEXTS: dict[str, Any] = {"text": TEXT, "length": 32, "text_samples": 8}


@pytest.mark.parametrize("group", [0, 16])
def test_floats_load_to_the_bit(group, llama, tmp_path):
    report = lw.compress(llama, tmp_path / "out", group=group, **FLOATS, **TEXTS)
    assert report.proof is not None
    assert report.proof.largest_difference == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "float-quantized"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn


def test_floats_and_integers_in_one_file(llama, tmp_path):
    plan = lw.plan(llama, bits=4, group=16, format="compressed-tensors")
    layers = dict(plan.layers)
    for name in layers:
        if name.endswith(("down_proj", "layers.1.self_attn.o_proj")):
            layers[name] = LayerPlan(bits=8, group=0, symmetric=True, method="fp8")
    report = lw.compress(llama, tmp_path / "out", plan=type(plan)(layers, plan.format), **TEXTS)
    assert report.proof is not None
    assert report.proof.largest_difference <= report.proof.allowed
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    formats = {group["format"] for group in config["config_groups"].values()}
    assert formats == {"float-quantized", "pack-quantized"}


def test_floats_in_fused_layers_go_together(llama, tmp_path):
    plan = lw.plan(llama, bits=8, group=0, format="compressed-tensors")
    layers = dict(plan.layers)
    name = "model.layers.0.self_attn.q_proj"
    layers[name] = LayerPlan(bits=8, group=0, symmetric=True, method="fp8")
    with pytest.raises(lw.UserError, match="one matrix"):
        lw.compress(llama, tmp_path / "out", plan=type(plan)(layers, plan.format), proof="none")


def test_floats_of_experts_load(tmp_path):
    models.make("mixtral", tmp_path / "model")
    texts: dict[str, Any] = {"text": models.inputs("mixtral"), "length": 16, "text_samples": 3}
    wish = {**FLOATS, "group": 0, "proof": "logits"}
    report = lw.compress(tmp_path / "model", tmp_path / "out", **wish, **texts)
    assert report.proof is not None


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_a_model_in_memory_is_refused_before_work(format, tmp_path):
    """Its loaders take a directory, with all that lies beside the weights."""
    module = models.built("llama")
    wish: dict[str, Any] = {"bits": 4, "group": 0, "format": format}
    with pytest.raises(lw.UserError, match="in memory"):
        lw.compress(module, tmp_path / "out", text=models.inputs("llama"), **wish)
    assert not list(tmp_path.iterdir())


def test_declares_every_tensor_it_writes(llama):
    source = lw.open(llama).source
    format, plan = CompressedTensors(source), LayerPlan(bits=3, group=16, symmetric=True)
    for layer in structure(source).layers.values():
        declared = {info.name for info in format.tensors(layer, plan, source.tensors[layer.tensor])}
        assert {f"{layer.name}.weight_{part}" for part in ("packed", "scale", "shape")} == declared


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "bert", "gpt_neox", "phi"])
def test_other_architectures_load(kind, tmp_path):
    models.make(kind, tmp_path / "model")
    grid = {"bits": 4, "group": 0, "symmetric": True, "format": "compressed-tensors"}
    ids = models.inputs(kind)
    texts = {"text": ids, "length": 16, "text_samples": 3, "proof": "logits"}
    report = lw.compress(tmp_path / "model", tmp_path / "out", **grid, **texts)
    assert report.proof is not None
