"""Block by block, a model answers what it answers whole, and what its layers read is seen."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from layerwise.core.errors import UserError
from layerwise.core.reading.checkpoint import Source, module_source, open_checkpoint
from layerwise.core.reading.structure import Layer, Structure, structure
from layerwise.core.running.evidence import Collector
from layerwise.core.running.runner import Runner

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def _answer(runner: Runner, ids: Tensor, changed: Mapping[str, Tensor] | None = None) -> Tensor:
    hidden = runner.start(ids)
    for block in runner.blocks:
        hidden = runner.forward(block, hidden, changed or {})
    return torch.cat([*runner.logits(hidden, ids, changed or {})])


def _expected(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        outcome = model(ids)
    return outcome if isinstance(outcome, Tensor) else outcome.logits


def _opened(source: Source) -> tuple[Structure, Runner]:
    found = structure(source)
    return found, Runner(source, found)


def _grams(runner: Runner, layers: list[Layer], ids: Tensor) -> dict[str, Tensor]:
    """The sum of x x^T over what each layer read, as collectors saw it."""
    words = frozenset({"gram", "inputs"})
    collectors = {layer.name: Collector(layer, words) for layer in layers}
    hidden = runner.start(ids)
    for block in runner.blocks:
        here = {
            layer.name: collectors[layer.name]
            for layer in layers
            if runner.whole or layer.block == block
        }
        hidden = runner.forward(block, hidden, {}, here)
    made: dict[str, Tensor] = {}
    for name, collector in collectors.items():
        evidence = collector.evidence()
        made[name] = evidence["gram"] * collector.tokens
        torch.testing.assert_close(evidence["inputs"].T @ evidence["inputs"], made[name], **CLOSE)
    return made


def _gram(inputs: Tensor) -> Tensor:
    rows = inputs.reshape(-1, inputs.shape[-1])
    return rows.T @ rows


def _expert_grams(module: Any, hidden: Tensor, chosen: Tensor, layers: list[Layer]):
    """What the experts of one block read, by the router's choice."""
    for number, weight in enumerate(module.gate_up_proj):
        inputs = hidden[(chosen == number).any(dim=-1)]
        gate, up = (inputs @ weight.T).chunk(2, dim=-1)
        middle = nn.functional.silu(gate) * up
        for layer in layers:
            if f".experts.{number}." in layer.name or layer.expert == number:
                yield layer.name, _gram(middle if layer.role == "down" else inputs)


def _hooked(model: nn.Module, source: Source, found: Structure, ids: Tensor) -> dict[str, Tensor]:
    """The same, from forward hooks on the whole model; experts apart."""
    made: dict[str, Tensor] = {}
    handles: list[Any] = []

    def watch(module: nn.Module, names: list[str]) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            made.update(dict.fromkeys(names, _gram(args[0])))

        handles.append(module.register_forward_pre_hook(hook))

    def watch_experts(module: nn.Module, layers: list[Layer]) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            made.update(_expert_grams(module, args[0], args[1], layers))

        handles.append(module.register_forward_pre_hook(hook))

    stored = {layer.name: source.read(layer.tensor) for layer in found.layers.values()}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            watch(module, [name for name, tensor in stored.items() if torch.equal(tensor, weight)])
        elif name.endswith(".experts"):
            block = name.partition(".mlp.")[0]
            layers = [layer for layer in found.layers.values() if layer.block == block]
            watch_experts(module, layers)
    _expected(model, ids)
    for handle in handles:
        handle.remove()
    return made


@pytest.mark.parametrize("model_type", models.SETTINGS)
def test_blocks_answer_as_the_whole_model(model_type: str, tmp_path: Path):
    model = models.make(model_type, tmp_path)
    found, runner = _opened(open_checkpoint(tmp_path))
    assert runner.blocks == found.blocks
    assert not runner.whole
    ids = models.inputs(model_type)
    torch.testing.assert_close(_answer(runner, ids), _expected(model, ids), **CLOSE)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_stacked_experts_answer_as_the_whole_model(model_type: str, tmp_path: Path):
    model = models.make_stacked(model_type, tmp_path)
    _, runner = _opened(open_checkpoint(tmp_path))
    ids = models.inputs(model_type)
    torch.testing.assert_close(_answer(runner, ids), _expected(model, ids), **CLOSE)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "mixtral", "vit"])
def test_a_module_in_memory_runs_too_and_is_not_touched(model_type: str):
    model = models.built(model_type).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, runner = _opened(module_source(model))
    ids = models.inputs(model_type)
    answer = _answer(runner, ids)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(answer, _expected(model.eval(), ids), **CLOSE)


@pytest.mark.parametrize("batch", [1, 2])
def test_windows_that_are_carried_apart_answer_alike(
    batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = models.make("gemma2", tmp_path)
    _, runner = _opened(open_checkpoint(tmp_path))
    monkeypatch.setattr(Runner, "batch", lambda self, ids: batch)
    ids = models.inputs("gemma2")
    torch.testing.assert_close(_answer(runner, ids), _expected(model, ids), **CLOSE)


@pytest.mark.parametrize("model_type", models.SETTINGS)
def test_collectors_see_what_layers_read(model_type: str, tmp_path: Path):
    model = models.make(model_type, tmp_path)
    source = open_checkpoint(tmp_path)
    found, runner = _opened(source)
    ids = models.inputs(model_type)
    seen = _grams(runner, [*found.layers.values()], ids)
    expected = _hooked(model, source, found, ids)
    assert seen.keys() == expected.keys() == found.layers.keys()
    for layer in found.layers.values():
        torch.testing.assert_close(seen[layer.name], expected[layer.name], **CLOSE)
        # What the data says is read together is so: one Gram matrix serves the group.
        torch.testing.assert_close(seen[layer.name], seen[layer.reads], **CLOSE)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_collectors_see_what_stacked_experts_read(model_type: str, tmp_path: Path):
    model = models.make_stacked(model_type, tmp_path)
    source = open_checkpoint(tmp_path)
    found, runner = _opened(source)
    ids = models.inputs(model_type)
    seen = _grams(runner, [*found.layers.values()], ids)
    expected = _hooked(model, source, found, ids)
    assert seen.keys() == expected.keys()
    for name, gram in expected.items():
        torch.testing.assert_close(seen[name], gram, **CLOSE)


@pytest.mark.parametrize("model_type", models.SETTINGS)
def test_changed_tensors_are_used(model_type: str, tmp_path: Path):
    models.make(model_type, tmp_path)
    found, runner = _opened(open_checkpoint(tmp_path))
    ids = models.inputs(model_type)
    tensors = load_file(tmp_path / "model.safetensors")
    before = _answer(runner, ids)
    # The last layer's expert is one that some token reaches: it is checked below.
    layers = [*found.layers.values()]
    for layer in (layers[0], layers[-1]):
        changed = {layer.tensor: tensors[layer.tensor].flip(0)}
        answer = _answer(runner, ids, changed)
        folder = tmp_path / layer.name
        folder.mkdir()
        for file in tmp_path.glob("*.json"):
            (folder / file.name).write_bytes(file.read_bytes())
        save_file(tensors | changed, folder / "model.safetensors", {"format": "pt"})
        _, other = _opened(open_checkpoint(folder))
        torch.testing.assert_close(answer, _answer(other, ids), **CLOSE)
        assert (answer - before).abs().max() > 1e-3, layer.name


def test_changed_tensors_outside_the_blocks_are_used(tmp_path: Path):
    model = models.make("llama", tmp_path)
    _, runner = _opened(open_checkpoint(tmp_path))
    ids = models.inputs("llama")
    changed = {"model.norm.weight": torch.zeros(32)}
    assert not _answer(runner, ids, changed).any()
    assert _expected(model, ids).any()


def test_a_checkpoint_of_the_base_model_runs_as_its_architecture(tmp_path: Path):
    """GPT-2's own checkpoint, among others, leaves the prefix `transformer.` out."""
    model = models.make("gpt2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    short |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}
    save_file(short, tmp_path / "model.safetensors", {"format": "pt"})
    found, runner = _opened(open_checkpoint(tmp_path))
    assert found.blocks == ["h.0", "h.1"]
    assert "h.0.attn.bias" in found.left
    ids = models.inputs("gpt2")
    torch.testing.assert_close(_answer(runner, ids), _expected(model, ids), **CLOSE)


def test_norms_after_the_sum_run(tmp_path: Path):
    model = models.make("opt", tmp_path, do_layer_norm_before=False)
    _, runner = _opened(open_checkpoint(tmp_path))
    ids = models.inputs("opt")
    torch.testing.assert_close(_answer(runner, ids), _expected(model, ids), **CLOSE)


def test_convolutional_network_is_one_block():
    model = models.convolutional()
    found, runner = _opened(module_source(model))
    assert runner.whole
    pictures = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(_answer(runner, pictures), _expected(model, pictures))
    outputs: dict[str, Tensor] = {}
    for name in found.layers:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _m, _a, out, name=name: outputs.update({name: out}))
    _expected(model, pictures)
    for layer in found.layers.values():
        collector = Collector(layer, frozenset({"inputs", "gram"}))
        runner.forward("", pictures, {}, {layer.name: collector})
        evidence = collector.evidence()
        columns = evidence["inputs"]
        module = model.get_submodule(layer.name)
        # The columns are right when the layer's matrix makes its output of them.
        made = columns @ layer.matrix(module.weight.detach()).T
        if module.bias is not None:
            made = made + module.bias.detach()
        output = outputs[layer.name]
        if output.dim() == 4:
            output = output.permute(0, 2, 3, 1)
        torch.testing.assert_close(made, output.reshape(-1, layer.rows), **CLOSE)
        gram = columns.T @ columns / len(columns)
        torch.testing.assert_close(evidence["gram"], gram, **CLOSE)


def test_a_grouped_convolution_cannot_be_observed():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    found, runner = _opened(module_source(model))
    collector = Collector(found.layers["0"], frozenset({"gram"}))
    with pytest.raises(UserError, match="grouped convolution"):
        runner.forward("", torch.randn(2, 4, 5, 5), {}, {"0": collector})


def test_a_layer_that_nothing_multiplies_is_not_silently_zero():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.inner.weight

    found, runner = _opened(module_source(Odd()))
    collector = Collector(found.layers["inner"], frozenset({"gram"}))
    runner.forward("", torch.randn(2, 4), {}, {"inner": collector})
    with pytest.raises(UserError, match="inner was not seen"):
        collector.evidence()


def test_an_expert_that_no_token_reached_has_zeros(tmp_path: Path):
    models.make("mixtral", tmp_path)
    found = structure(open_checkpoint(tmp_path))
    layer = found.layers["model.layers.0.block_sparse_moe.experts.0.w1"]
    evidence = Collector(layer, frozenset({"gram", "magnitude", "inputs"})).evidence()
    assert not evidence["gram"].any()
    assert not evidence["magnitude"].any()
    assert evidence["inputs"].shape == (0, layer.width)


def test_magnitude_and_norm_are_the_mean_size_of_each_input(tmp_path: Path):
    models.make("llama", tmp_path)
    found = structure(open_checkpoint(tmp_path))
    layer = found.layers["model.layers.0.self_attn.q_proj"]
    collector = Collector(layer, frozenset({"magnitude", "norm"}))
    rows = torch.randn(10, 32)
    collector.see(rows[:4])
    collector.see(rows[4:])
    evidence = collector.evidence()
    torch.testing.assert_close(evidence["magnitude"], rows.abs().mean(dim=0))
    torch.testing.assert_close(evidence["norm"], rows.square().mean(dim=0).sqrt())


def test_a_missing_tensor_is_named(tmp_path: Path):
    models.make("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        _opened(open_checkpoint(tmp_path))


def test_a_block_that_the_model_class_lacks_is_named(tmp_path: Path):
    models.make("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.2.self_attn.q_proj.weight"] = torch.zeros(32, 32)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.2.*has nothing there"):
        _opened(open_checkpoint(tmp_path))


def test_a_class_that_transformers_lacks_is_named(tmp_path: Path):
    models.make("llama", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "SomethingElse"))
    with pytest.raises(UserError, match="SomethingElse, which transformers does not have"):
        _opened(open_checkpoint(tmp_path))
