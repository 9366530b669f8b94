"""GPTQ files, read back by GPTQModel: by way of transformers, and by itself where grids differ.

CI installs it without its dependencies, which pin a newer torch than it needs:
pip install --no-build-isolation --no-deps gptqmodel pypcre logbar device-smi tokenicer defuser
(and, with theirs, the extra `gptq`: optimum, accelerate, datasets).
"""

from importlib.util import find_spec
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

import layerwise as lw
from layerwise.core.plan import LayerPlan, Plan
from layerwise.export.gptq import Gptq

TEXT = torch.arange(8 * 32).remainder(256).reshape(8, 32)
TEXTS: dict[str, Any] = {"text": TEXT, "length": 32, "text_samples": 8}
needs_gptqmodel = pytest.mark.skipif(
    find_spec("gptqmodel") is None,
    reason="GPTQModel, the loader of these files, is not installed",
)


@pytest.fixture
def whole_words(make_llama, tmp_path):
    """A Llama whose narrowest layer has 32 outputs, so that 3-bit codes fill words."""
    model = make_llama(tmp_path / "model", num_key_value_heads=4)
    tensors = load_file(model / "model.safetensors")
    for name in tensors:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            tensors[name] = torch.randn(32, 32) / 6
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


@needs_gptqmodel
@pytest.mark.parametrize("group", [0, 16, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_transformers_answers_as_the_result_in_memory(bits, group, whole_words, tmp_path):
    wish = {"bits": bits, "group": group, "format": "gptq"}
    report = lw.compress(whole_words, tmp_path / "out", **wish, **TEXTS)
    assert report.proof is not None
    assert report.proof.largest_difference <= report.proof.allowed


def mixed(name: str) -> LayerPlan:
    if name.endswith("down_proj"):
        return LayerPlan(bits=8, group=0, symmetric=True)
    if "layers.0.mlp" in name:
        return LayerPlan(bits=3, group=32, symmetric=True)
    if name.endswith("layers.1.self_attn.o_proj"):
        return LayerPlan()
    return LayerPlan(bits=4, group=16, symmetric=True)


@needs_gptqmodel
def test_gptqmodel_reads_a_grid_for_each_layer(whole_words, tmp_path):
    plan = Plan({name: mixed(name) for name in lw.open(whole_words).structure.layers}, "gptq")
    report = lw.compress(whole_words, tmp_path / "out", plan=plan, **TEXTS)
    assert report.proof is not None
    assert report.proof.largest_difference <= report.proof.allowed
    assert report.proof.loader.startswith("GPTQModel")
    again = lw.evaluate(tmp_path / "out", against=whole_words, samples=2, length=32)
    assert again.text is not None
    assert again.text.kl is not None


@needs_gptqmodel
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma2", "gemma3_text", "opt", "gpt_neox"])
def test_other_architectures_load(kind, tmp_path):
    models.make(kind, tmp_path / "model")
    wish: dict[str, Any] = {"bits": 4, "group": 16, "format": "gptq", "proof": "logits"}
    texts: dict[str, Any] = {"text": models.inputs(kind), "length": 16, "text_samples": 3}
    assert lw.compress(tmp_path / "model", tmp_path / "out", **wish, **texts).proof is not None


@needs_gptqmodel
def test_commands_print_nothing_of_the_loader_s(whole_words, tmp_path, capfd):
    lw.compress(whole_words, tmp_path / "out", bits=4, group=16, format="gptq", **TEXTS)
    assert not capfd.readouterr().out


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes down the columns of int32 words, as one long number each, the slow way."""
    columns: list[list[int]] = []
    for column in words.T.tolist():
        number = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(column))
        codes = range(32 * len(column) // bits)
        columns.append([number >> (bits * code) & (2**bits - 1) for code in codes])
    return torch.tensor(columns).T


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_layout_is_the_definition(bits, whole_words, tmp_path):
    out = tmp_path / "out"
    lw.compress(whole_words, out, bits=bits, group=16, format="gptq", proof="none")
    stored = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    assert unpacked(stored[f"{name}.qzeros"].T, bits).eq(2 ** (bits - 1) - 1).all()
    assert stored[f"{name}.g_idx"].tolist() == [place // 16 for place in range(64)]
    scales = stored[f"{name}.scales"]
    assert scales.dtype == torch.float16
    codes = unpacked(stored[f"{name}.qweight"], bits)  # (in, out)
    weight = (codes - 2 ** (bits - 1)) * scales.float()[stored[f"{name}.g_idx"].long()]
    lw.compress(whole_words, tmp_path / "dense", bits=bits, group=16, symmetric=True, proof="none")
    dense = load_file(tmp_path / "dense" / "model.safetensors")[f"{name}.weight"]
    assert weight.T.equal(dense)


def test_rules_match_the_names_that_a_server_fuses_layers_under(llama):
    opened = lw.open(llama)
    plan = Plan({name: mixed(name) for name in opened.structure.layers}, "gptq")
    config = Gptq(opened.source).config(plan, opened.structure)["quantization_config"]
    dynamic = config["dynamic"]
    names = [rule for rule in dynamic if "gate_up_proj" in rule]
    assert len(names) == 1
    assert dynamic[names[0]] == {"bits": 3, "group_size": 32}
    left = [rule for rule in dynamic if rule.startswith("-:")]
    assert len(left) == 1
    assert "o_proj" in left[0]
    assert config["bits"] == 4
    assert not any("qkv_proj" in rule for rule in dynamic)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"bits": 5}, "5 bits"),
        ({"bits": 4, "symmetric": False}, "asymmetric"),
        ({"bits": 3}, "do not fill"),
        ({"bits": 4, "group": 8}, "a group of 8"),
    ],
)
def test_refuses_what_it_has_no_place_for(changes, problem, llama, tmp_path):
    wish = {"group": 16, "format": "gptq", "proof": "none"}
    with pytest.raises(lw.UserError, match=problem):
        lw.compress(llama, tmp_path / "out", **wish | changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["mixtral", "bert", "gpt2"])
def test_refuses_models_that_its_loaders_do_not_read(kind, tmp_path):
    models.make(kind, tmp_path / "model")
    with pytest.raises(lw.UserError, match="gptq"):
        lw.compress(
            tmp_path / "model", tmp_path / "out", bits=4, group=0, format="gptq", proof="none"
        )


def test_a_scale_beyond_float16_is_refused_by_name(make_llama, tmp_path):
    model = make_llama(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e7
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(lw.UserError, match=r"layers\.1\.mlp\.up_proj.*65504"):
        lw.compress(model, tmp_path / "out", bits=4, group=16, format="gptq", proof="none")
    assert not (tmp_path / "out").exists()


@needs_gptqmodel
def test_tiny_scales_are_rounded_in_memory_too(make_llama, tmp_path):
    model = make_llama(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e-5
    tensors["model.layers.0.mlp.gate_proj.weight"] *= 1e4
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    wish = {"bits": 4, "group": 16, "format": "gptq"}
    report = lw.compress(model, tmp_path / "out", **wish, **TEXTS)
    assert report.proof is not None
    assert report.proof.largest_difference <= report.proof.allowed
