"""Batch norms and biases that are tuned once layers are transformed, against their definitions."""

import copy
import json

import models
import pytest
import resnet
import small_cnn
import torch
from safetensors.torch import load_file
from torch import nn

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.plan import read_plan, to_yaml
from layerwise.core.running.tuning import Tuned, told

TEXT = {"proof": "logits", "samples": 8, "length": 32, "text_samples": 4, "noise_floor": False}


def test_norms_see_the_mean_and_variance_of_all_that_passes(tmp_path):
    made = small_cnn.digits()
    before = copy.deepcopy(made.net.state_dict())
    net, report = small_cnn.compressed(made, tmp_path / "out", bits=3, tune=["norms"])
    assert all(torch.equal(before[name], one) for name, one in made.net.state_dict().items())
    assert any("4 batch norms" in note for note in report.notes)
    assert report.proof is not None
    # The definition: batches of 64 as the flow runs them, each norm by the batch's own statistics.
    slow = copy.deepcopy(net)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in slow.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
            module.register_forward_pre_hook(
                lambda _, given, name=name: seen.setdefault(name, []).append(given[0])
            )
    with torch.no_grad():
        for batch in made.calibration.split(64):
            slow(batch)
    for name, parts in seen.items():
        values = torch.cat(parts).transpose(0, 1).flatten(1).double()
        norm = net.get_submodule(name)
        assert torch.allclose(norm.running_mean.double(), values.mean(dim=1), atol=1e-5)
        assert torch.allclose(norm.running_var.double(), values.var(dim=1), rtol=1e-4)


def test_tuning_brings_a_net_of_few_bits_back(tmp_path):
    made = small_cnn.digits()
    nets = {
        tune: small_cnn.compressed(made, tmp_path / "-".join(["out", *tune]), bits=2, tune=tune)[0]
        for tune in ((), ("norms",), ("bias",), ("norms", "bias"))
    }
    plain = nets.pop(())
    for tune, net in nets.items():
        assert made.accuracy(net) >= made.accuracy(plain) + 0.05, tune
        assert made.divergence(net) <= 0.6 * made.divergence(plain), tune


@pytest.mark.trained
def test_norms_bring_a_trained_resnet_back(tmp_path):
    made = resnet.pictures()
    plain, tuned = (
        made.accuracy(made.compressed(tmp_path / "-".join(["out", *tune]), bits=3, tune=tune))
        for tune in ((), ("norms",))
    )
    assert tuned >= plain + 0.04


def test_the_last_layer_keeps_its_bias(tmp_path):
    made = small_cnn.digits()
    net, report = small_cnn.compressed(made, tmp_path / "out", bits=2, tune=["bias"])
    assert torch.equal(net.last.bias, made.net.last.bias)
    assert not torch.equal(net.conv4.bias, made.net.conv4.bias)
    assert not torch.equal(net.norm1.bias, made.net.norm1.bias)
    assert torch.equal(net.norm1.running_mean, made.net.norm1.running_mean)
    assert any("5 biases, learned: KL" in note for note in report.notes)


def test_a_bias_gives_back_the_mean_that_its_layer_lost(tmp_path):
    """On the first layer of a model, whose inputs nothing has changed."""
    folder, name = tmp_path / "model", "model.layers.0.self_attn.q_proj"
    model = models.make("qwen2", folder)
    ids = models.inputs("qwen2")
    asked = {"bits": 2, "group": 16, "calibration": ids, "text": ids, **TEXT, "length": 16}
    report = lw.compress(folder, tmp_path / "out", tune=["bias"], **asked)
    assert report.proof is not None
    assert any("6 biases, each moved" in note for note in report.notes)
    seen: list[torch.Tensor] = []
    layer = model.get_submodule(name)
    layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, -2)))
    with torch.no_grad():
        model(ids)
    written = load_file(tmp_path / "out" / "model.safetensors")
    shown = torch.cat(seen)
    mean = (shown @ layer.weight.T + layer.bias).mean(dim=0)
    now = (shown @ written[f"{name}.weight"].T + written[f"{name}.bias"]).mean(dim=0)
    assert torch.allclose(now, mean, atol=1e-4)


def test_biases_are_corrected_where_scales_are_folded(tmp_path):
    models.make("opt", tmp_path / "model")
    ids = models.inputs("opt")
    asked = {"bits": 3, "group": 16, "method": "awq", "calibration": ids, "text": ids, **TEXT}
    report = lw.compress(tmp_path / "model", tmp_path / "out", tune=["bias"], **asked)
    assert report.proof is not None  # the files answer as the model in memory did
    plain = lw.compress(tmp_path / "model", tmp_path / "plain", **asked)
    assert report.comparison.kl < plain.comparison.kl


def test_what_is_not_there_is_refused(llama, tmp_path):
    asked = {"bits": 4, "group": 16}
    with pytest.raises(UserError, match=r"tuning \(bias\).*no text was given"):
        lw.compress(llama, tmp_path / "out", tune=["bias"], **asked)
    for tune, lacking in (("norms", "no batch norm"), ("bias", "no bias")):
        with pytest.raises(UserError, match=lacking):
            lw.compress(
                llama, tmp_path / "out", tune=[tune], calibration="builtin", **asked, **TEXT
            )


def test_no_limit_is_promised_for_what_is_not_foreseen(tmp_path):
    module, pictures = models.convolutional(), torch.randn(8, 3, 8, 8)
    asked = {"bits": 8, "group": 0, "calibration": pictures, "max_memory": "64GiB"}
    with pytest.raises(UserError, match=r"biases .* is not foreseen"):
        lw.compress(module, tmp_path / "out", tune=["bias"], **asked)
    assert not list(tmp_path.iterdir())
    lw.compress(module, tmp_path / "out", tune=["norms"], **asked)


def test_a_plan_says_what_is_tuned(tmp_path):
    made = small_cnn.digits()
    opened = lw.open(made.net)
    plan = lw.plan(made.net, bits=4, tune=["norms", "bias"], calibration=made.calibration)
    file = tmp_path / "plan.yaml"
    file.write_text(to_yaml(plan, "net", opened.structure))
    assert read_plan(file, opened.structure).tune == ("norms", "bias")
    file.write_text(file.read_text().replace("- norms", "- scales"))
    with pytest.raises(UserError, match="norms or bias"):
        read_plan(file, opened.structure)


def test_a_stopped_run_tells_what_it_tuned(tmp_path, monkeypatch):
    """Killed after the blocks are done, it ends with the same bytes and the same words."""
    made = small_cnn.digits()
    asked = {"bits": 3, "tune": ["norms", "bias"], "calibration": made.calibration}
    whole = lw.compress(made.net, tmp_path / "whole", **asked)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("layerwise.flow.compressing._prove", stop)
        with pytest.raises(KeyboardInterrupt):
            lw.compress(made.net, tmp_path / "again", **asked)
    again = lw.compress(made.net, tmp_path / "again", **asked)
    for name in ("model.safetensors", "plan.yaml"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    tuned = [[note for note in one.notes if "tuned" in note] for one in (whole, again)]
    assert tuned[0] == tuned[1]
    assert len(tuned[0]) == 2


def test_what_was_tuned_is_told_in_one_line_each():
    parts = [Tuned(biases=2), Tuned(biases=3), Tuned()]
    assert told(parts) == ["tuned: 5 biases, each moved by what its layer lost of its mean answer"]
    kept = [Tuned.from_json(json.loads(json.dumps(one.as_json()))) for one in parts]
    assert kept == parts
    learned = Tuned(1, 1, (0.5, 0.25))
    assert Tuned.from_json(json.loads(json.dumps(learned.as_json()))) == learned
