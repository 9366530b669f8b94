"""What a model is made of is read from its names, its shapes and its `config.json`."""

from pathlib import Path

import models
import pytest
import torch
from torch import nn

from layerwise.core.errors import UserError
from layerwise.core.reading.checkpoint import module_source, open_checkpoint
from layerwise.core.reading.families import FAMILIES, GENERIC
from layerwise.core.reading.structure import Structure, structure

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
BERT = tuple(f"attention.self.{name}" for name in ("query", "key", "value"))
VIT = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))

# Layers of block 0 that read one input, those that are fused, and the name of the block.
TOGETHER: dict[str, tuple[str, list[tuple[str, ...]], list[tuple[str, ...]]]] = {
    **{
        name: ("model.layers.0", [QKV, GATE_UP], [QKV, GATE_UP])
        for name in ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2")
    },
    "gemma3_text": ("model.layers.0", [QKV, GATE_UP], [QKV, GATE_UP]),
    "phi": ("model.layers.0", [(*QKV, "mlp.fc1")], [QKV]),
    "phi3": ("model.layers.0", [], []),
    "gpt2": ("transformer.h.0", [], []),
    "gpt_neox": ("gpt_neox.layers.0", [], []),
    "opt": ("model.decoder.layers.0", [QKV], [QKV]),
    "bert": ("bert.encoder.layer.0", [BERT], []),
    "roberta": ("roberta.encoder.layer.0", [BERT], []),
    "vit": ("vit.encoder.layer.0", [VIT], []),
    "mixtral": (
        "model.layers.0",
        [QKV]
        + [tuple(f"block_sparse_moe.experts.{e}.{w}" for w in ("w1", "w3")) for e in range(4)],
        [QKV]
        + [tuple(f"block_sparse_moe.experts.{e}.{w}" for w in ("w1", "w3")) for e in range(4)],
    ),
}
for _name, _more in (
    ("qwen2_moe", [("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")]),
    ("qwen3_moe", []),
):
    _experts = [
        tuple(f"mlp.experts.{expert}.{part}_proj" for part in ("gate", "up")) for expert in range(4)
    ]
    TOGETHER[_name] = ("model.layers.0", [QKV, *_experts, *_more], [QKV, *_experts, *_more])


def _shared(found: Structure, block: str, attribute: str) -> list[tuple[str, ...]]:
    """Names, inside a block, of the layers that share the value of an attribute."""
    grouped: dict[str, list[str]] = {}
    for layer in found.layers.values():
        if layer.block == block:
            inside = layer.name.removeprefix(f"{block}.")
            grouped.setdefault(getattr(layer, attribute), []).append(inside)
    return sorted(tuple(sorted(names)) for names in grouped.values() if len(names) > 1)


def test_every_family_has_a_model():
    types = {name for facts in FAMILIES for name in facts.types}
    # The text part of the first is the second; a checkpoint with both is not run here.
    assert types - {"gemma3"} == set(models.SETTINGS) == set(TOGETHER)


@pytest.mark.parametrize("model_type", models.SETTINGS)
def test_family(model_type: str, tmp_path: Path):
    models.make(model_type, tmp_path)
    source = open_checkpoint(tmp_path)
    found = structure(source)
    block, reads, fused = TOGETHER[model_type]
    assert found.family is not GENERIC
    assert found.blocks == [block, f"{block[:-1]}1"]
    assert _shared(found, block, "reads") == sorted(tuple(sorted(names)) for names in reads)
    assert _shared(found, block, "fused") == sorted(tuple(sorted(names)) for names in fused)
    held = {layer.tensor for layer in found.layers.values()}
    assert held | set(found.left) == set(source.tensors)
    assert held.isdisjoint(found.left)


@pytest.mark.parametrize("model_type", models.SETTINGS)
def test_every_layer_of_a_family_has_its_role_and_its_inputs(model_type: str, tmp_path: Path):
    models.make(model_type, tmp_path)
    found = structure(open_checkpoint(tmp_path))
    described = {name for facts in found.family.reads for name in facts.layers}
    for layer in found.layers.values():
        inside = layer.name.removeprefix(f"{layer.block}.")
        assert layer.role not in ("linear", "convolution"), layer.name
        assert ".experts." in inside or inside in described, layer.name


@pytest.mark.parametrize("model_type", models.SETTINGS)
def test_what_is_left_alone_says_why(model_type: str, tmp_path: Path):
    models.make(model_type, tmp_path)
    source = open_checkpoint(tmp_path)
    left = structure(source).left
    for name, info in source.tensors.items():
        expected = ""
        if name.endswith(("norm.weight", ".bias", "LayerNorm.weight")):
            expected = "a vector"
        elif any(word in name for word in ("embed_tokens", "wte", "wpe", "embed_in", "embeddings")):
            expected = "a vector" if len(info.shape) == 1 else "embedding"
        elif name.startswith(("lm_head", "embed_out", "classifier", "cls")) and len(info.shape) > 1:
            expected = "output head"
        elif name.endswith((".gate.weight", "shared_expert_gate.weight")):
            expected = "router"
        assert left.get(name, "").startswith(expected), name
        assert not expected or name in left, name


def test_conv1d_is_read_as_out_by_in(tmp_path: Path):
    model = models.make("gpt2", tmp_path)
    source = open_checkpoint(tmp_path)
    layer = structure(source).layers["transformer.h.0.attn.c_attn"]
    assert (layer.layout, layer.rows, layer.width) == ("conv1d", 96, 32)
    tensor = source.read(layer.tensor)
    matrix = layer.matrix(tensor)
    assert matrix.shape == (96, 32)
    x = torch.randn(5, 32)
    bias = model.state_dict()["transformer.h.0.attn.c_attn.bias"]
    module = model.get_submodule("transformer.h.0.attn.c_attn")
    torch.testing.assert_close(module(x), x @ matrix.T + bias)
    assert torch.equal(layer.store(matrix, tuple(tensor.shape)), tensor)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_in_one_tensor(model_type: str, tmp_path: Path):
    models.make_stacked(model_type, tmp_path)
    source = open_checkpoint(tmp_path)
    found = structure(source)
    tensor = "model.layers.1.mlp.experts.gate_up_proj"
    layer = found.layers[f"{tensor}[3]"]
    whole = source.read(tensor)
    assert (layer.expert, layer.rows, layer.width) == (3, *whole.shape[1:])
    assert layer.role == "gate, up"
    assert torch.equal(layer.matrix(whole), whole[3])
    assert torch.equal(layer.store(whole[3], tuple(whole.shape)), whole[3])
    assert len([one for one in found.layers.values() if one.tensor == tensor]) == len(whole)
    assert found.left["model.layers.1.mlp.gate.weight"].startswith("router")


@pytest.mark.parametrize("model_type", models.SETTINGS)
def test_a_module_in_memory_has_as_many_layers_as_its_checkpoint(model_type: str, tmp_path: Path):
    model = models.make(model_type, tmp_path)
    in_memory, on_disk = structure(module_source(model)), structure(open_checkpoint(tmp_path))
    assert len(in_memory.blocks) == len(on_disk.blocks)
    assert sum(one.count for one in in_memory.layers.values()) == sum(
        one.count for one in on_disk.layers.values()
    )
    if "moe" not in model_type and model_type != "mixtral":
        roles = [one.role for one in in_memory.layers.values()]
        assert sorted(roles) == sorted(one.role for one in on_disk.layers.values())
        assert len(in_memory.items()) == len(on_disk.items())


def test_norms_after_the_sum_feed_nothing(tmp_path: Path):
    models.make("opt", tmp_path, do_layer_norm_before=False)
    found = structure(open_checkpoint(tmp_path))
    feeders = {layer.feeder.rpartition(".")[2] for layer in found.layers.values()}
    assert feeders == {"", "v_proj"}


def test_convolutional_network():
    found = structure(module_source(models.convolutional()))
    assert found.family is GENERIC
    assert found.blocks == [""]
    shapes = {layer.name: (layer.rows, layer.width) for layer in found.layers.values()}
    assert shapes == {"conv1": (8, 27), "conv2": (12, 120), "conv3": (6, 12), "fc": (5, 6)}
    assert {layer.role for layer in found.layers.values()} == {"convolution", "linear"}
    assert all(layer.reads == layer.fused == layer.name for layer in found.layers.values())
    assert found.left["bn1.weight"].startswith("a vector")
    assert found.left["bn1.num_batches_tracked"] == "holds integers"


def test_plain_sequential():
    found = structure(module_source(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))))
    assert [*found.layers] == ["0", "2"]
    assert set(found.left) == {"0.bias", "2.bias"}


def test_unknown_architecture_assumes_nothing():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(4, 4)
            self.k_proj = nn.Linear(4, 4)
            self.experts = nn.Module()
            self.experts.gate_up_proj = nn.Parameter(torch.randn(3, 4, 8))
            self.router = nn.Linear(4, 3)
            self.register_buffer("mask", torch.ones(1, 1, 4, 4))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tok_embeddings = nn.Embedding(9, 4)
            self.layers = nn.ModuleList([Block(), Block()])
            self.classifier = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
            self.score = nn.Linear(4, 2)

    found = structure(module_source(Model()))
    assert found.family is GENERIC
    assert found.blocks == ["", "layers.0", "layers.1"]
    names = [layer.name for layer in found.layers.values()]
    assert names == [
        "classifier.0",
        "classifier.1",
        *(f"layers.{i}.{part}_proj" for i in (0, 1) for part in ("k", "q")),
    ]
    assert all(one.reads == one.fused == one.name for one in found.layers.values())
    assert found.layers["layers.0.q_proj"].role == "query"
    assert found.left["tok_embeddings.weight"] == "embedding"
    assert found.left["score.weight"] == "output head"
    assert found.left["layers.0.router.weight"].startswith("router")
    assert found.left["layers.0.mask"].startswith("not a module's weight")
    assert "axes are not known" in found.left["layers.0.experts.gate_up_proj"]


def test_blocks_come_in_numerical_order():
    names = [f"layers.{number}.0.weight" for number in range(12)]
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in names)
    assert structure(module_source(model)).blocks == [f"layers.{number}" for number in range(12)]


def test_a_quantized_checkpoint_is_refused(tmp_path: Path):
    models.make("llama", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(
        config.read_text().replace("{", '{"quantization_config": {"quant_method": "x"},', 1)
    )
    with pytest.raises(UserError, match="quantized already"):
        structure(open_checkpoint(tmp_path))


def test_a_model_without_matrices_is_refused():
    with pytest.raises(UserError, match="no layer to work on"):
        structure(module_source(nn.LayerNorm(4)))
