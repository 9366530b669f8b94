"""Merges that look at texts or inputs, that try models, or that permute them; and the command."""

import json

import pytest
import torch
from relatives import relatives, weights_of
from torch import nn

import layerwise as lw
from layerwise.cli import main
from layerwise.core.merging.matching import permuted
from layerwise.core.reading.checkpoint import module_source, open_checkpoint
from layerwise.core.reading.symmetry import symmetries


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, llama):
    return relatives(tmp_path_factory.mktemp("family"), llama, 2)


def classifier(seed):
    torch.manual_seed(seed)
    parts = (nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))
    return nn.Sequential(*parts).eval()


def loaded(out, like):
    return lw.load(out, into=like)


def test_regmean_reads_what_each_model_sees(tmp_path):
    models, inputs = [classifier(1), classifier(2)], [torch.randn(30, 6), 3 * torch.randn(30, 6)]
    lw.merge(models, tmp_path / "out", method="regmean", calibration=inputs,
             options={"off_diagonal": 1.0, "ridge": 1e-9})  # fmt: skip
    merged = loaded(tmp_path / "out", models[0])
    grams = [(x.T @ x / len(x)).double() for x in inputs]
    pull = sum(m[0].weight.double() @ g for m, g in zip(models, grams, strict=True))
    expected = pull @ torch.linalg.inv(sum(grams))
    torch.testing.assert_close(merged[0].weight.double(), expected, rtol=1e-3, atol=1e-4)
    average = (models[0][0].bias + models[1][0].bias) / 2
    torch.testing.assert_close(merged[0].bias, average)


def slow_fisher(model, inputs):
    sums = {name: torch.zeros_like(one) for name, one in model.named_parameters()}
    for one in inputs:
        scored = model(one[None]).log_softmax(dim=-1)[0]
        for likelihood in scored:
            model.zero_grad()
            likelihood.backward(retain_graph=True)
            for name, parameter in model.named_parameters():
                sums[name] += float(likelihood.detach().exp()) * parameter.grad**2
    length = sum(float(one.double().square().sum()) for one in sums.values()) ** 0.5
    return {name: one / length for name, one in sums.items()}


def test_fisher_weighs_by_squared_gradients(tmp_path):
    models, inputs = [classifier(1), classifier(2)], torch.randn(8, 6)
    lw.merge(models, tmp_path / "out", method="fisher", calibration=inputs)
    merged = loaded(tmp_path / "out", models[0])
    known = [slow_fisher(model, inputs) for model in models]
    for name in ("0.weight", "4.bias"):
        weights = [one[name].clamp(min=1e-6) for one in known]
        parts = [model.state_dict()[name] for model in models]
        expected = sum(w * p for w, p in zip(weights, parts, strict=True)) / sum(weights)
        torch.testing.assert_close(merged.state_dict()[name], expected, rtol=1e-3, atol=1e-4)


def test_weights_are_found_for_each_block(tuned, tmp_path, text):
    report = lw.merge(
        tuned[1:], tmp_path / "out", base=tuned[0], method="task_arithmetic", fit=str(text),
        fit_evaluations=30, text_samples=2, length=32,
    )  # fmt: skip
    fit = report.fit
    assert fit.evaluations <= 30
    assert fit.loss <= fit.uniform_loss
    assert fit.groups.keys() == {"outside the blocks", "model.layers.0", "model.layers.1"}
    row = next(row for row in report.rows if row.tensor == "model.layers.1.mlp.up_proj.weight")
    assert list(row.shares) == list(fit.groups["model.layers.1"])
    # The plan beside the result makes it again.
    again = lw.merge(out=tmp_path / "again", plan=tmp_path / "out" / "merge.yaml")
    assert again.method == "task_arithmetic"
    first, second = weights_of(tmp_path / "out"), weights_of(tmp_path / "again")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_unconstrained_tries_modules(tmp_path):
    base, models = classifier(0), [classifier(1), classifier(2)]
    inputs = torch.randn(40, 6)
    wanted = models[0](inputs).detach()

    def loss(model):
        with torch.no_grad():
            return float((model(inputs) - wanted).square().mean())

    report = lw.merge(models, tmp_path / "out", base=base, method="unconstrained", loss=loss,
                      options={"generations": 4})  # fmt: skip
    scores = {one.model: one.loss for one in report.scores}
    assert scores["merged"] == pytest.approx(loss(loaded(tmp_path / "out", base)), rel=1e-5)
    assert scores["merged"] < loss(base)


def shuffled(state, found):
    orders = {one.name: torch.randperm(one.units(state)) for one in found}
    return {name: permuted(name, one, found, orders) for name, one in state.items()}


def test_a_permuted_llama_is_the_same_function_and_is_matched(llama, tmp_path):
    source, state = open_checkpoint(llama), weights_of(llama)
    other = shuffled(state, symmetries(source))
    assert not torch.equal(
        other["model.layers.0.self_attn.q_proj.weight"],
        state["model.layers.0.self_attn.q_proj.weight"],
    )
    model, ids = lw.load(llama), torch.arange(20)[None] * 7
    before = model(ids).logits
    model.load_state_dict(other, strict=False)
    model.tie_weights()
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    from relatives import with_weights

    path = with_weights(tmp_path / "other", llama, other)
    lw.merge([llama, path], tmp_path / "out", method="weight_matching")
    torch.testing.assert_close(lw.load(tmp_path / "out")(ids).logits, before, rtol=1e-4, atol=1e-4)


class Block(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        if before != after:
            parts = nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after)
            self.downsample = nn.Sequential(*parts)

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (self.downsample(x) if hasattr(self, "downsample") else x)).relu()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Block(4, 4))
        self.layer2 = nn.Sequential(Block(4, 8), Block(8, 8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.layer2(self.layer1(self.bn1(self.conv1(x)).relu()))
        return self.fc(x.mean((2, 3)))


def test_a_permuted_residual_network_is_the_same_function():
    model = Residual().eval()
    for name, one in model.state_dict().items():
        if one.is_floating_point():
            one.copy_(torch.rand(one.shape) + 0.1 if "var" in name else torch.randn(one.shape))
    found = symmetries(module_source(model))
    assert len([one for one in found if one.name.startswith("stream")]) == 2
    images = torch.randn(2, 3, 6, 6)
    before = model(images)
    model.load_state_dict(shuffled(model.state_dict(), found))
    torch.testing.assert_close(model(images), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_methods_that_look_at_texts_refuse_to_go_without(method, tuned, tmp_path):
    with pytest.raises(lw.UserError, match="none was given"):
        lw.merge(tuned[1:], tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists()


def test_the_command_merges(tuned, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["merge", str(tuned[1]), str(tuned[2]), "--base", str(tuned[0]), "--method", "ties"]
    how = ["--ties-density", "0.5", "--weights", "0/1,1/0", "-o", str(out), "--json"]
    assert main([*given, *how]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["method"] == "ties"
    rows = {row["tensor"]: row for row in told["rows"]}
    assert rows["model.layers.0.mlp.up_proj.weight"]["shares"] == [0.0, 1.0]
    assert rows["model.norm.weight"]["shares"] == [1.0, 0.0]
    assert rows["model.norm.weight"]["options"] == {"density": 0.5}
    assert main([*given, *how]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["run", str(out / "recipe.yaml"), "-o", str(tmp_path / "again")]) == 0
    first, second = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()
