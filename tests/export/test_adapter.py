"""Low-rank corrections beside the files, as peft loads them."""

import json
import shutil
from functools import partial
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file

import layerwise as lw
from layerwise.core.keeping.staging import Staging, arrange
from layerwise.core.plan import LayerPlan, Plan

TEXT = torch.arange(8 * 32).remainder(256).reshape(8, 32)
TEXTS: dict[str, Any] = {"text": TEXT, "length": 32, "text_samples": 8}
GRID: dict[str, Any] = {"bits": 3, "group": 16, "format": "compressed-tensors"}
WEIGHTS = "adapter/adapter_model.safetensors"
pytest.importorskip("peft", reason="peft, the loader of adapters, is not installed")


def ranked(name: str) -> LayerPlan:
    rank = {"q_proj": 5, "k_proj": 5, "down_proj": 2}.get(name.rpartition(".")[2], 0)
    bits = None if name.endswith("layers.1.mlp.down_proj") else 3
    return LayerPlan(bits=bits, group=16, symmetric=True, rank=rank, density=1.0)


def test_peft_answers_as_the_result_in_memory(llama, tmp_path):
    report = lw.compress(llama, tmp_path / "out", **GRID, rank=4, **TEXTS)
    assert report.proof is not None
    assert "peft" in report.proof.loader
    assert report.proof.largest_difference <= report.proof.allowed
    # Without the adapter it would not.
    shutil.rmtree(tmp_path / "out" / "adapter")
    with torch.no_grad():
        bare = lw.load(tmp_path / "out")(TEXT).logits
        whole = lw.load(llama)(TEXT).logits
    assert float((bare - whole).abs().max()) > 100 * report.proof.allowed


def test_a_rank_for_each_layer(llama, tmp_path):
    layers = {name: ranked(name) for name in lw.open(llama).structure.layers}
    plan = Plan(layers, "compressed-tensors")
    report = lw.compress(llama, tmp_path / "out", plan=plan, **TEXTS)
    assert report.proof is not None
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 5)
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert sorted(set(config["rank_pattern"].values())) == [2]
    stored = load_file(tmp_path / "out" / WEIGHTS)
    first = "base_model.model.model.layers.0.self_attn.q_proj"
    assert stored[f"{first}.lora_A.weight"].shape == (5, 32)
    assert stored[f"{first}.lora_B.weight"].shape == (32, 5)
    assert len(stored) == 2 * len(config["target_modules"]) == 2 * 6


def test_scales_that_moved_into_the_feeder(llama, text, tmp_path):
    report = lw.compress(
        llama,
        tmp_path / "out",
        **GRID,
        method="awq",
        rank=2,
        calibration=str(text),
        samples=8,
        length=32,
        text_samples=4,
    )
    assert report.proof is not None
    assert report.proof.largest_difference <= report.proof.allowed


def test_its_bytes_are_counted(llama, tmp_path):
    plain = lw.compress(llama, tmp_path / "a", **GRID, proof="none")
    report = lw.compress(llama, tmp_path / "b", **GRID, rank=4, proof="none")
    file = tmp_path / "b" / WEIGHTS
    assert report.bytes_after == plain.bytes_after + file.stat().st_size
    rows = zip(report.layers, plain.layers, strict=True)
    factors = sum(with_rank.bytes_after - without.bytes_after for with_rank, without in rows)
    assert factors == sum(tensor.nbytes for tensor in load_file(file).values())


def test_the_index_names_no_tensor_of_it(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("layerwise.export._adapter.arrange", partial(arrange, shard_bytes=20_000))
    report = lw.compress(llama, tmp_path / "out", **GRID, rank=4, **TEXTS)
    assert report.proof is not None
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert not any("lora" in name for name in index["weight_map"])


def test_a_run_that_stopped_ends_with_the_same_bytes(llama, tmp_path, monkeypatch):
    lw.compress(llama, tmp_path / "whole", **GRID, rank=4, **TEXTS)
    real, calls = Staging.finish_step, list[str]()

    def stopping(self: Any, step: str, *rest: Any, **named: Any) -> None:
        real(self, step, *rest, **named)
        calls.append(step)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("layerwise.core.keeping.staging.Staging.finish_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        lw.compress(llama, tmp_path / "out", **GRID, rank=4, **TEXTS)
    assert (tmp_path / "out.partial" / WEIGHTS).exists()
    report = lw.compress(llama, tmp_path / "out", **GRID, rank=4, **TEXTS)
    assert report.proof is not None
    for name in ("model.safetensors", WEIGHTS, "adapter/adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    files = {f.relative_to(tmp_path / "whole") for f in (tmp_path / "whole").rglob("*")}
    assert {f.relative_to(tmp_path / "out") for f in (tmp_path / "out").rglob("*")} == files


def test_restart_without_a_rank_leaves_no_adapter(llama, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("layerwise.core.keeping.staging.Staging.publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lw.compress(llama, tmp_path / "out", **GRID, rank=4, proof="none")
    lw.compress(llama, tmp_path / "out", **GRID, proof="none", restart=True)
    assert not (tmp_path / "out" / "adapter").exists()


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_experts_are_refused(tmp_path):
    models.make("mixtral", tmp_path / "model")
    with pytest.raises(lw.UserError, match="correction of experts"):
        lw.compress(tmp_path / "model", tmp_path / "out", **GRID | {"group": 0}, rank=2)


def test_gptq_files_have_one_too(llama, tmp_path):
    pytest.importorskip("gptqmodel", reason="GPTQModel, the loader of the base, is not installed")
    wish = {"bits": 2, "group": 16, "format": "gptq", "rank": 4}
    report = lw.compress(llama, tmp_path / "out", **wish, **TEXTS)
    assert report.proof is not None
    assert report.proof.largest_difference <= report.proof.allowed
    again = lw.evaluate(tmp_path / "out", against=llama, samples=2, length=32)
    assert again.text is not None
    assert again.text.kl is not None
