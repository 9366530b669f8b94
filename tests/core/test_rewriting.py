"""A model that is rewritten before it is quantized answers as it did."""

from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.reading.checkpoint import Source, module_source, open_checkpoint
from layerwise.core.reading.structure import structure
from layerwise.core.rewriting.rewriting import (
    Rewriting,
    Rewritten,
    Scale,
    combined,
    gains_folded,
    head_size,
    inputs_scaled,
    keys_scaled,
    pair_peaks,
    rewrite,
    stream_of,
    stream_turned,
    values_turned,
)
from layerwise.core.rewriting.rotation import rotation
from layerwise.core.running.runner import Runner

TURNED = [
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "phi3"),
    *("mixtral", "qwen2_moe", "qwen3_moe"),
]
KEYED = [kind for kind in TURNED if kind != "phi3"]
# Heads whose keys are normed, whose norms add to their weights, and layers with biases.
SETTINGS = {
    "llama": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "gemma": {"attention_bias": True},
}


def answer(source: Source, ids: Tensor) -> Tensor:
    runner = Runner(source, structure(source))
    hidden = runner.start(ids)
    for block in runner.blocks:
        hidden = runner.forward(block, hidden, {})
    return torch.cat([*runner.logits(hidden, ids, {})])


def peaks_of(source: Source, ids: Tensor) -> dict[str, Tensor]:
    runner = Runner(source, structure(source))
    keys = [name for name in structure(source).layers if name.endswith("k_proj")]
    watching = {name: pair_peaks(source, name) for name in keys}
    hidden = runner.start(ids)
    for block in runner.blocks:
        inside = {name: one for name, one in watching.items() if name.startswith(block)}
        hidden = runner.forward(block, hidden, {}, inside)
    return {name: one.peaks for name, one in watching.items()}


def same(first: Tensor, second: Tensor) -> bool:
    return float((first - second).abs().max()) <= 1e-4 * float(first.abs().max())


def made(kind: str, folder: Path, **settings: object) -> Source:
    models.make(kind, folder, **{**SETTINGS.get(kind, {}), **settings})
    return open_checkpoint(folder)


@pytest.mark.parametrize("rotate", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("kind", TURNED)
def test_a_turned_model_is_the_same_function(kind, rotate, tmp_path):
    source = made(kind, tmp_path)
    turned = rewrite(source, Rewriting(rotate, seed=3))
    ids = models.inputs(kind)
    assert same(answer(source, ids), answer(turned, ids))
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight"):
        assert (turned.read(name) - source.read(name)).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_tied_head_becomes_a_tensor_of_its_own(kind, tmp_path):
    source = made(kind, tmp_path, tie_word_embeddings=True)
    turned = rewrite(source, Rewriting("hadamard"))
    assert isinstance(turned, Rewritten)
    head = turned.tensors["lm_head.weight"]
    assert "lm_head.weight" not in source.tensors
    assert head.shape == source.tensors["model.embed_tokens.weight"].shape
    assert turned.config["tie_word_embeddings"] is False
    assert any(f"adds {head.size / 1e6:.3g} MB" in note for note in turned.notes)
    ids = models.inputs(kind)
    assert same(answer(source, ids), answer(turned, ids))


@pytest.mark.parametrize("part", ["gains", "values"])
def test_each_part_is_the_same_function_by_itself(part, tmp_path):
    source = made("qwen2", tmp_path)
    stream = stream_of(source, Rewriting("hadamard"))
    heads = rotation("hadamard", head_size(source), seed=5)
    changes = {
        "gains": gains_folded(source, stream),
        "values": values_turned(source, stream, heads),
    }[part]
    assert changes
    # A head that is tied has the embedding's weight, so that the gain before it is its own change.
    head = [source.tensors["model.embed_tokens.weight"]] if part == "gains" else []
    added = [type(info)("lm_head.weight", info.dtype, info.shape) for info in head]
    settings = {"tie_word_embeddings": not added and source.config["tie_word_embeddings"]}
    added = [one for one in added if one.name not in source.tensors]
    changed = Rewritten(source, changes, added, settings, "", ())
    ids = models.inputs("qwen2")
    assert same(answer(source, ids), answer(changed, ids))


@pytest.mark.parametrize("kind", [kind for kind in TURNED if kind != "phi3"])
def test_inputs_are_scaled_in_what_feeds_them(kind, tmp_path):
    source, ids = made(kind, tmp_path), models.inputs(kind)
    found = structure(source)
    fed = {layer.feeder: layer.width for layer in found.layers.values() if layer.feeder}
    assert any("up_proj" in name or "w3" in name for name in fed)
    generator = torch.Generator().manual_seed(1)
    parts = [
        inputs_scaled(source, found, name, torch.rand(width, generator=generator) + 0.5)
        for name, width in fed.items()
    ]
    scaled = Rewritten(source, combined(parts), (), {}, "", ())
    assert same(answer(source, ids), answer(scaled, ids))
    for name in fed:
        assert not torch.equal(scaled.read(f"{name}.weight"), source.read(f"{name}.weight"))


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_inputs_are_scaled_after_the_stream_was_turned(kind, tmp_path):
    source, ids = made(kind, tmp_path, tie_word_embeddings=False), models.inputs(kind)
    stream, found = stream_of(source, Rewriting("hadamard")), structure(source)
    norms = {layer.feeder for layer in found.layers.values() if "norm" in layer.feeder}
    assert len(norms) == 4
    parts = [
        gains_folded(source, stream),
        stream_turned(source, stream, rotation("hadamard", 32)),
        *(inputs_scaled(source, found, norm, torch.rand(32) + 0.5) for norm in norms),
    ]
    scaled = Rewritten(source, combined(parts), (), {}, "", ())
    assert same(answer(source, ids), answer(scaled, ids))


def test_turning_a_stream_whose_norms_have_gains_is_another_function(tmp_path):
    source = made("llama", tmp_path)
    stream = stream_of(source, Rewriting("hadamard"))
    changes = stream_turned(source, stream, rotation("hadamard", 32))
    ids = models.inputs("llama")
    assert not same(answer(source, ids), answer(Rewritten(source, changes, (), {}, "", ()), ids))


@pytest.mark.parametrize("kind", TURNED)
def test_rows_are_those_of_the_whole(kind, tmp_path):
    source = made(kind, tmp_path)
    turned = rewrite(source, Rewriting("hadamard", scale_keys=kind != "phi3"), _some_peaks(source))
    for name, info in turned.tensors.items():
        whole = turned.read(name)
        assert whole.dtype == info.dtype
        assert tuple(whole.shape) == info.shape
        for start, stop in ((0, 3), (5, 11), (7, None), (0, 10_000)):
            part = turned.read(name, start, stop)
            torch.testing.assert_close(part, whole[start:stop], rtol=0, atol=1e-6)


def _some_peaks(source: Source) -> dict[str, Tensor]:
    keys = [name for name in structure(source).layers if name.endswith("k_proj")]
    heads = int(source.config["num_key_value_heads"]) if keys else 0
    return {name: torch.rand(heads, head_size(source) // 2) + 0.5 for name in keys}


def test_rows_that_are_made_together_are_made_once(llama):
    """They are kept until the last of them is read, and nothing is kept after that."""

    class Counted:
        def __init__(self, source: Source) -> None:
            self.source, self.reads = source, 0

        def __getattr__(self, name: str):
            return getattr(self.source, name)

        def read(self, *asked):
            self.reads += 1
            return self.source.read(*asked)

    counted = Counted(open_checkpoint(llama))
    turned = rewrite(counted, Rewriting("hadamard"))
    counted.reads = 0
    name = "model.layers.0.mlp.down_proj.weight"
    parts = [turned.read(name, start, start + 8) for start in range(0, 32, 8)]
    assert counted.reads == 1
    assert torch.equal(torch.cat(parts), turned.read(name))
    assert not turned._held


def test_a_dtype_is_kept(tmp_path):
    model = models.built("llama").bfloat16()
    model.save_pretrained(tmp_path)
    turned = rewrite(open_checkpoint(tmp_path), Rewriting("hadamard"))
    assert {turned.read(name).dtype for name in turned.tensors} == {torch.bfloat16}


@pytest.mark.parametrize("kind", KEYED)
def test_scaled_keys_are_the_same_function_and_of_one_size(kind, tmp_path):
    source = made(kind, tmp_path)
    ids = models.inputs(kind)
    peaks = peaks_of(source, ids)
    assert len(peaks) == 2
    scaled = rewrite(source, Rewriting(scale_keys=True), peaks)
    assert same(answer(source, ids), answer(scaled, ids))
    for seen in peaks_of(scaled, ids).values():
        largest = seen.amax(dim=0) if kind.startswith("qwen3") else seen
        torch.testing.assert_close(largest, torch.ones_like(largest), rtol=1e-3, atol=0)


def test_the_peaks_of_keys_are_those_of_the_model(tmp_path):
    model = models.make("qwen3", tmp_path)
    ids = models.inputs("qwen3")
    seen: list[Tensor] = []
    norm = model.get_submodule("model.layers.0.self_attn.k_norm")
    norm.register_forward_hook(lambda module, given, keys: seen.append(keys))
    with torch.no_grad():
        model(ids)
    keys = torch.cat(seen).flatten(0, 1)  # (tokens, heads, size)
    expected = torch.zeros(2, 4)
    for token, head, pair in torch.cartesian_prod(*map(torch.arange, (len(keys), 2, 4))):
        size = (keys[token, head, pair] ** 2 + keys[token, head, pair + 4] ** 2) ** 0.5
        expected[head, pair] = max(expected[head, pair], size)
    found = peaks_of(open_checkpoint(tmp_path), ids)["model.layers.0.self_attn.k_proj"]
    torch.testing.assert_close(found, expected)


def test_scaling_one_member_of_a_pair_is_another_function(tmp_path):
    source = made("llama", tmp_path)
    ids = models.inputs("llama")
    stream = stream_of(source, Rewriting(scale_keys=True))
    changes = dict(keys_scaled(source, stream, _some_peaks(source)))
    for name, change in changes.items():
        (step,) = change.steps
        assert isinstance(step, Scale)
        halves = step.by.unflatten(0, (-1, 2, head_size(source) // 2)).clone()
        halves[:, 1] = 1
        changes[name] = type(change)([Scale("rows", halves.flatten())])
    wrong = Rewritten(source, changes, (), {}, "", ())
    assert not same(answer(source, ids), answer(wrong, ids))


def test_a_dead_pair_of_keys_stays_finite(tmp_path):
    source = made("llama", tmp_path)
    peaks = {name: torch.zeros_like(one) for name, one in _some_peaks(source).items()}
    scaled = rewrite(source, Rewriting(scale_keys=True), peaks)
    for name in scaled.tensors:
        assert scaled.read(name).isfinite().all()


def test_both_rewrites_together(tmp_path):
    source = made("qwen3", tmp_path)
    ids = models.inputs("qwen3")
    both = rewrite(source, Rewriting("hadamard", scale_keys=True), peaks_of(source, ids))
    assert same(answer(source, ids), answer(both, ids))
    assert combined([]) == {}


@pytest.mark.parametrize("kind", sorted(set(models.SETTINGS) - set(TURNED)))
def test_other_families_are_refused_by_name(kind, tmp_path):
    models.make(kind, tmp_path)
    with pytest.raises(UserError, match=f"is a {kind}, .*--rotate cannot be used") as refused:
        rewrite(open_checkpoint(tmp_path), Rewriting("hadamard"))
    assert all(known in str(refused.value) for known in TURNED)


def test_a_tensor_that_is_not_known_is_refused(tmp_path):
    model = models.make("llama", tmp_path)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    tensors["model.layers.0.self_attn.gate.weight"] = torch.ones(4, 32)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.gate\.weight .*--rotate"):
        rewrite(open_checkpoint(tmp_path), Rewriting("hadamard"))


def test_experts_in_one_tensor_and_modules_are_refused(tmp_path):
    models.make_stacked("mixtral", tmp_path)
    with pytest.raises(UserError, match="--rotate cannot be used"):
        rewrite(open_checkpoint(tmp_path), Rewriting("hadamard"))
    with pytest.raises(UserError, match="in memory"):
        rewrite(module_source(models.built("llama")), Rewriting("hadamard"))
    models.make("phi3", tmp_path / "phi3")
    with pytest.raises(UserError, match="one layer: --scale-keys"):
        rewrite(open_checkpoint(tmp_path / "phi3"), Rewriting(scale_keys=True))
