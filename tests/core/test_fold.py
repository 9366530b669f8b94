"""A scale that is moved from a layer's input into what feeds it leaves the model as it was."""

from dataclasses import replace
from pathlib import Path

import models
import pytest
import torch
from torch import Tensor

from layerwise.core.reading.checkpoint import Source, open_checkpoint
from layerwise.core.reading.structure import Layer, Structure, structure
from layerwise.core.rewriting.fold import fold
from layerwise.core.running.runner import Runner

# How often each kind of feeder occurs in two blocks; families that are not here have none.
FEEDERS = {
    **{
        name: {"input_layernorm": 2, "post_attention_layernorm": 2, "up_proj": 2}
        for name in ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma")
    },
    **{
        name: {"input_layernorm": 2, "pre_feedforward_layernorm": 2, "up_proj": 2}
        for name in ("gemma2", "gemma3_text")
    },
    "phi": {"input_layernorm": 2},
    "phi3": {"input_layernorm": 2, "post_attention_layernorm": 2},
    "gpt2": {"ln_1": 2, "ln_2": 2},
    "gpt_neox": {"input_layernorm": 2, "post_attention_layernorm": 2},
    "opt": {"self_attn_layer_norm": 2, "final_layer_norm": 2, "v_proj": 2},
    "vit": {"layernorm_before": 2, "layernorm_after": 2},
    "mixtral": {"input_layernorm": 2, "w3": 8},
    "qwen2_moe": {"input_layernorm": 2, "up_proj": 10},
    "qwen3_moe": {"input_layernorm": 2, "up_proj": 8},
}


def _answer(runner: Runner, ids: Tensor, changed: dict[str, Tensor]) -> Tensor:
    hidden = runner.start(ids)
    for block in runner.blocks:
        hidden = runner.forward(block, hidden, changed)
    return torch.cat([*runner.logits(hidden, ids, changed)])


def _folded(source: Source, found: Structure, feeder: str, scale: Tensor) -> dict[str, Tensor]:
    names = [f"{feeder}.{kind}" for kind in ("weight", "bias")]
    tensors = {name: source.read(name) for name in names if name in source.tensors}
    return fold(feeder, tensors, scale, norm_offset=found.family.norm_offset)


def _by_feeder(found: Structure) -> dict[str, list[Layer]]:
    fed: dict[str, list[Layer]] = {}
    for layer in found.layers.values():
        if layer.feeder:
            fed.setdefault(layer.feeder, []).append(layer)
    return fed


@pytest.mark.parametrize("model_type", FEEDERS)
def test_every_feeder_in_the_data_feeds_its_layers_and_nothing_else(
    model_type: str, tmp_path: Path
):
    models.make(model_type, tmp_path)
    source = open_checkpoint(tmp_path)
    found = structure(source)
    runner = Runner(source, found)
    ids = models.inputs(model_type)
    before = _answer(runner, ids, {})
    generator = torch.Generator().manual_seed(3)
    kinds: dict[str, list[str]] = {}
    fed = _by_feeder(found)
    for feeder in fed:
        kinds.setdefault(feeder.rpartition(".")[2], []).append(feeder)
    assert {kind: len(feeders) for kind, feeders in kinds.items()} == FEEDERS[model_type]
    for kind, feeders in kinds.items():
        divided: dict[str, Tensor] = {}
        widened: dict[str, Tensor] = {}
        for feeder in feeders:
            assert len({layer.reads for layer in fed[feeder]}) == 1, feeder
            scale = torch.rand(fed[feeder][0].width, generator=generator) * 3 + 0.25
            divided |= _folded(source, found, feeder, scale)
            for layer in fed[feeder]:
                tensor = source.read(layer.tensor)
                wider = layer.matrix(tensor) * scale
                widened[layer.tensor] = layer.store(wider, tuple(tensor.shape))
        alone = _answer(runner, ids, divided)
        assert (alone - before).abs().max() > 0.1, f"{kind}: the test would see nothing"
        after = _answer(runner, ids, divided | widened)
        assert (after - before).abs().max() < 1e-4, kind


@pytest.mark.parametrize(
    ("model_type", "consumer", "feeder"),
    [
        ("llama", "mlp.down_proj", "mlp.gate_proj"),
        ("gemma2", "self_attn.o_proj", "self_attn.q_proj"),
        ("gemma2", "mlp.down_proj", "mlp.gate_proj"),
        ("bert", "intermediate.dense", "attention.output.LayerNorm"),
        ("gpt_neox", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h"),
    ],
)
def test_a_wrong_feeder_would_be_noticed(
    model_type: str, consumer: str, feeder: str, tmp_path: Path
):
    models.make(model_type, tmp_path)
    source = open_checkpoint(tmp_path)
    found = structure(source)
    runner = Runner(source, found)
    ids = models.inputs(model_type)
    block = found.blocks[0]
    layer = replace(found.layers[f"{block}.{consumer}"], feeder=f"{block}.{feeder}")
    scale = torch.rand(layer.width, generator=torch.Generator().manual_seed(5)) * 3 + 0.25
    changed = _folded(source, found, layer.feeder, scale)
    changed[layer.tensor] = source.read(layer.tensor) * scale
    difference = _answer(runner, ids, changed) - _answer(runner, ids, {})
    assert difference.abs().max() > 0.1


def test_a_wrong_norm_offset_would_be_noticed(tmp_path: Path):
    models.make("gemma", tmp_path)
    source = open_checkpoint(tmp_path)
    found = structure(source)
    runner = Runner(source, found)
    ids = models.inputs("gemma")
    wrong = replace(found, family=replace(found.family, norm_offset=0.0))
    feeder = f"{found.blocks[0]}.input_layernorm"
    layers = _by_feeder(found)[feeder]
    scale = torch.rand(32, generator=torch.Generator().manual_seed(6)) * 3 + 0.25
    changed = _folded(source, wrong, feeder, scale)
    changed |= {layer.tensor: source.read(layer.tensor) * scale for layer in layers}
    difference = _answer(runner, ids, changed) - _answer(runner, ids, {})
    assert difference.abs().max() > 0.1


@pytest.mark.parametrize("model_type", sorted(set(models.SETTINGS) - set(FEEDERS)))
def test_families_without_feeders(model_type: str, tmp_path: Path):
    models.make(model_type, tmp_path)
    assert not _by_feeder(structure(open_checkpoint(tmp_path)))


def test_value_feeds_output_where_norms_come_after_the_sum(tmp_path: Path):
    models.make("opt", tmp_path, do_layer_norm_before=False)
    source = open_checkpoint(tmp_path)
    found = structure(source)
    runner = Runner(source, found)
    ids = models.inputs("opt")
    fed = _by_feeder(found)
    assert {feeder.rpartition(".")[2] for feeder in fed} == {"v_proj"}
    changed: dict[str, Tensor] = {}
    for feeder, layers in fed.items():
        scale = torch.rand(32, generator=torch.Generator().manual_seed(4)) + 0.5
        changed |= _folded(source, found, feeder, scale)
        changed[layers[0].tensor] = source.read(layers[0].tensor) * scale
    before = _answer(runner, ids, {})
    torch.testing.assert_close(_answer(runner, ids, changed), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_multiplies_by_its_weight_and_an_offset(offset: float):
    weight, bias, scale = torch.randn(6), torch.randn(6), torch.rand(6) + 0.5
    made = fold("n", {"n.weight": weight, "n.bias": bias}, scale, norm_offset=offset)
    x = torch.randn(4, 6)
    folded = x * (made["n.weight"] + offset) + made["n.bias"]
    torch.testing.assert_close(folded, (x * (weight + offset) + bias) / scale)


def test_a_layer_is_divided_by_rows():
    weight, bias, scale = torch.randn(6, 3), torch.randn(6), torch.rand(6) + 0.5
    given = {"up.weight": weight, "up.bias": bias}
    made = fold("up", given, scale, norm_offset=1.0)
    x = torch.randn(4, 3)
    folded = x @ made["up.weight"].T + made["up.bias"]
    torch.testing.assert_close(folded, (x @ weight.T + bias) / scale)
    assert torch.equal(given["up.weight"], weight)
    assert made.keys() == given.keys()
