"""Two ways through a model, by tensor and by block, write the same weights from the same plan."""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import layerwise as lw
from layerwise.core.reading.checkpoint import open_checkpoint, open_source
from layerwise.core.reading.structure import structure

WISHES = {
    "rtn": {"bits": 3, "group": 16},
    "symmetric": {"bits": 4, "group": 0, "symmetric": True},
    "magnitude": {"density": 0.3},
    "both": {"bits": 4, "group": 32, "density": 0.5},
    "corrected": {"bits": 2, "group": 16, "rank": 4},
    "packed": {"bits": 3, "group": 16, "symmetric": True, "format": "compressed-tensors"},
}
WINDOWS = {"length": 32, "text_samples": 4}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.fixture(scope="session")
def half(make_llama, tmp_path_factory) -> Path:
    """The same model in bfloat16, with a head of its own."""
    folder = tmp_path_factory.mktemp("half") / "llama"
    model = make_llama(folder, dtype=torch.bfloat16, tie_word_embeddings=False)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wish", WISHES.values(), ids=WISHES.keys())
def test_by_tensor_and_by_block(llama, half, tmp_path, wish, dtype):
    model = llama if dtype == "float32" else half
    texts = {"text": ["a text of some length to compare on " * 9], **WINDOWS}
    streamed = lw.compress(model, tmp_path / "streamed", **wish, proof="none")
    walked = lw.compress(model, tmp_path / "walked", **wish, **texts, proof="logits")
    assert streamed.proof is None
    assert walked.proof is not None
    one, other = ((tmp_path / name) for name in ("streamed", "walked"))
    assert {f.name for f in one.iterdir()} == {f.name for f in other.iterdir()}
    for file in one.glob("model*.safetensors"):
        assert file.read_bytes() == (other / file.name).read_bytes()
    rows = {row.layer: row for row in walked.layers}
    assert rows.keys() == {row.layer for row in streamed.layers}
    for row in streamed.layers:
        assert row.error == pytest.approx(rows[row.layer].error, rel=1e-4)
        assert row.density == pytest.approx(rows[row.layer].density)
        assert row.stored_bits == rows[row.layer].stored_bits


DOUBLE = pytest.param(
    "walked",
    torch.float64,
    marks=pytest.mark.xfail(reason="walk.py rounds a layer that its plan leaves to float32"),
)


@pytest.mark.parametrize(
    ("way", "dtype"),
    [("streamed", torch.float64), DOUBLE, ("streamed", torch.float16), ("walked", torch.float16)],
    ids=str,
)
def test_a_layer_that_is_left_keeps_every_bit(make_llama, tmp_path, way, dtype):
    model = make_llama(tmp_path / "model", dtype=dtype)
    source = lw.open(model)
    kept = "model.layers.0.self_attn.o_proj"
    file = tmp_path / "plan.yaml"
    file.write_text(
        "layers: {'*.mlp.*': {bits: 4, group: 16}, '*.?_proj': {bits: 4, group: 16}, "
        f"{kept}: {{}}}}"
    )
    texts = {"text": ["a text of some length to compare on " * 9], **WINDOWS}
    proof = "none" if way == "streamed" else "logits"
    lw.compress(model, tmp_path / "out", plan=file, **texts, proof=proof)
    found = weights(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    for tensor in [f"{kept}.weight", *source.structure.left]:
        assert torch.equal(found[tensor], source.source.read(tensor)), tensor


def test_shards_and_one_file_give_the_same_tensors(make_llama, llama, tmp_path):
    sharded = make_llama(tmp_path / "sharded", shards=3)
    wish = WISHES["both"]
    for name, model in (
        ("shards", sharded),
        ("folder", llama),
        ("file", llama / "model.safetensors"),
    ):
        lw.compress(model, tmp_path / name, **wish, proof="none")
    # Named alone, with its config.json beside it, it is that model still.
    texts = {"text": ["a text of some length to compare on " * 9], **WINDOWS}
    lw.compress(llama / "model.safetensors", tmp_path / "run", **wish, **texts)
    expected = weights(tmp_path / "folder")
    for name in ("shards", "file", "run"):
        assert same(weights(tmp_path / name), expected), name
        assert (tmp_path / name / "config.json").exists()


def test_a_file_on_its_own_needs_nothing_beside_it(llama, tmp_path):
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((llama / "model.safetensors").read_bytes())
    (tmp_path / "letter.json").write_text("{}")
    report = lw.compress(alone, tmp_path / "out", bits=4, group=16)
    assert report.proof is None
    assert "letter.json" not in {file.name for file in (tmp_path / "out").iterdir()}


def test_output_in_several_shards(llama, tmp_path, monkeypatch):
    from layerwise.core import format

    lw.compress(llama, tmp_path / "one", bits=4, group=16, proof="none")
    small = functools.partial(format.arrange, shard_bytes=20_000)
    monkeypatch.setattr(format, "arrange", small)
    lw.compress(llama, tmp_path / "many", bits=4, group=16, proof="none")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert same(weights(tmp_path / "many"), weights(tmp_path / "one"))
    reopened = open_checkpoint(tmp_path / "many")
    assert reopened.tensors.keys() == weights(tmp_path / "one").keys()


def test_tied_weights_are_stored_once(llama, tmp_path):
    report = lw.compress(llama, tmp_path / "out", bits=4, group=16, text=["b" * 999], **WINDOWS)
    assert "lm_head.weight" not in weights(tmp_path / "out")
    assert report.proof is not None
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))
    net[2].weight = net[0].weight
    lw.compress(net, tmp_path / "net", bits=4, group=0)
    assert weights(tmp_path / "net").keys() == {"0.weight"}


def test_what_lies_beside_the_weights_is_carried_over(make_llama, tmp_path):
    model = make_llama(tmp_path / "model")
    beside = {"tokenizer_config.json": b"{}", "README.md": b"# A model", "merges.txt": b"a b"}
    for name, content in beside.items():
        (model / name).write_bytes(content)
    (model / "optimizer.pt").write_bytes(b"a pickle")
    (model / "report.json").write_bytes(b"of another run")
    out = tmp_path / "out"
    lw.compress(model, out, bits=4, group=16, proof="none")
    for name in (*beside, "config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert not (out / "optimizer.pt").exists()
    assert json.loads((out / "report.json").read_text())["format"] == "dense"


class Odd(nn.Module):
    """Vectors, scalars, integers, an empty tensor, a convolution: whatever a module may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm1d(6)
        self.linear = nn.Linear(6, 10, dtype=torch.float64)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("nothing", torch.zeros(0, 3))
        self.register_buffer("flags", torch.tensor([True, False]))


def test_a_module_from_python(tmp_path):
    module = Odd()
    report = lw.compress(module, tmp_path / "out", bits=4, group=0)
    found = weights(tmp_path / "out")
    assert found.keys() == module.state_dict().keys()
    changed = {row.layer for row in report.layers}
    assert changed == {"conv", "linear"}
    for name, tensor in module.state_dict().items():
        assert found[name].dtype == tensor.dtype
        quantized = name.removesuffix(".weight") in changed and name.endswith(".weight")
        assert torch.equal(found[name], tensor) != quantized
    module.load_state_dict(found)


def test_a_module_has_the_layers_of_its_checkpoint(llama):
    tensors = load_file(llama / "model.safetensors")

    class Tree(nn.Module):
        def state_dict(self, **_):
            return tensors

    module = structure(open_source(Tree()))
    assert module.layers.keys() == structure(open_checkpoint(llama)).layers.keys()


def test_large_experts_in_one_tensor_are_sliced(tmp_path):
    generator = torch.Generator().manual_seed(0)
    stacked = torch.randn(2, 640, 512, generator=generator)
    tensors = {"model.layers.0.mlp.experts.gate_up_proj": stacked}
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "qwen3_moe", "hidden_size": 512}
    (folder / "config.json").write_text(json.dumps(config))
    lw.compress(folder, tmp_path / "out", bits=4, group=64, proof="none")
    found = weights(tmp_path / "out")["model.layers.0.mlp.experts.gate_up_proj"]
    from layerwise.quantize.rtn import rtn

    for expert in range(2):
        expected = rtn(stacked[expert], bits=4, group=64).dequantize()
        assert torch.equal(found[expert], expected)


def test_a_stopped_run_of_another_module_is_not_taken_up(tmp_path, monkeypatch):
    """Modules of one shape differ in their weights."""
    from layerwise.flow import compressing

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    modules = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        modules.append(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)))
    with monkeypatch.context() as patch:
        patch.setattr(compressing, "_small_files", stop)
        with pytest.raises(KeyboardInterrupt):
            lw.compress(modules[0], tmp_path / "out", bits=4, group=16)
    with pytest.raises(lw.UserError, match="other weights or other options"):
        lw.compress(modules[1], tmp_path / "out", bits=4, group=16)
    lw.compress(modules[0], tmp_path / "out", bits=4, group=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_is_proven_as_it_will_be_used(tmp_path, dtype):
    """In evaluation mode, whatever mode it is in, and its own mode is left alone."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 64), nn.Dropout(0.5), nn.Linear(64, 8)).to(dtype)
    inputs = torch.randn(64, 32)
    report = lw.compress(module, tmp_path / "out", bits=4, group=16, calibration=inputs)
    assert report.proof is not None
    assert module.training
