"""Barriers of layers and of growing groups of blocks, against whole models that are averaged."""

import itertools
import statistics

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.measure.barrier import barrier
from layerwise.measure.growing_barrier import growing_barrier

TEXT = torch.arange(8 * 32).remainder(251).reshape(8, 32)
SHOWN = {"calibration": TEXT, "samples": 8, "length": 32, "cache": False}


def test_is_how_far_the_loss_rises_above_the_line():
    ends = torch.tensor([1.0, 3.0])
    assert barrier(torch.tensor([1.0, 2.5, 9.0]), ends) == pytest.approx(0.5)
    assert barrier(torch.tensor([1.0, 1.25, 1.5, 3.0, 2.0]), ends) == pytest.approx(0.5)
    assert barrier(torch.tensor([1.0, 1.0, 1.0]), ends) == pytest.approx(-1.0)
    path = torch.rand(11)
    line = [1 + 2 * k / 10 for k in range(11)]
    rises = [float(value) - at for value, at in zip(path, line, strict=True)][1:-1]
    assert growing_barrier(path, ends) == pytest.approx(max(rises), rel=1e-6)


def test_a_way_needs_a_point_between_its_ends():
    with pytest.raises(UserError, match="2 points"):
        barrier(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))


@pytest.fixture(scope="module")
def pair(llama, tmp_path_factory):
    """Two models of one architecture, far from each other."""
    other = tmp_path_factory.mktemp("pair") / "other"
    other.mkdir()
    for file in llama.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tensors = load_file(llama / "model.safetensors")
    moved = {name: t + torch.randn_like(t) * 0.2 for name, t in tensors.items()}
    save_file(moved, other / "model.safetensors", {"format": "pt"})
    return llama, other


def loss(model):
    with torch.no_grad():
        logits = model(TEXT).logits[:, :-1].flatten(0, 1)
    return float(functional.cross_entropy(logits, TEXT[:, 1:].flatten()))


def averaged(pair, prefixes):
    """Loss of the first model with everything below some modules halfway to the second."""
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32).eval() for one in pair
    )
    other = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if name.startswith(prefixes):
            parameter.data = (parameter.data + other[name].data) / 2
    return loss(ours)


def test_the_way_of_a_layer_is_that_of_the_whole_model(pair):
    ours, theirs = pair
    names = ["barrier", "growing_barrier", "deep_barrier", "random_barrier"]
    found = lw.inspect(ours, names, against=theirs, **SHOWN).scores
    line = (averaged(pair, ("none",)) + averaged(pair[::-1], ("none",))) / 2
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        expected = averaged(pair, (f"{layer}.",)) - line
        assert found["barrier"][layer] == pytest.approx(expected, rel=1e-3, abs=1e-4)
        block = ".".join(layer.split(".")[:3])
        grown = tuple(f"model.layers.{n}." for n in range(int(block[-1]) + 1))
        expected = averaged(pair, grown) - line
        assert found["growing_barrier"][layer] == pytest.approx(expected, rel=1e-3, abs=1e-4)
        deep = tuple(f"model.layers.{n}." for n in range(int(block[-1]), 2))
        expected = averaged(pair, deep) - line
        assert found["deep_barrier"][layer] == pytest.approx(expected, rel=1e-3, abs=1e-4)
        drawn = torch.randperm(2, generator=torch.Generator().manual_seed(0)).tolist()
        upto = drawn[: drawn.index(int(block[-1])) + 1]
        expected = averaged(pair, tuple(f"model.layers.{n}." for n in upto)) - line
        assert found["random_barrier"][layer] == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_a_model_and_itself_have_no_barrier(llama):
    names = ["barrier", "growing_barrier", "deep_barrier", "random_barrier"]
    scores = lw.inspect(llama, names, against=llama, **SHOWN).scores
    assert all(abs(value) < 1e-6 for column in scores.values() for value in column.values())


def test_all_measures_take_the_other_model_with_them(pair):
    ours, theirs = pair
    found = lw.inspect(ours, against=theirs, **SHOWN)
    assert {"rotation", "displacement", "alignment", "barrier"} <= found.scores.keys()
    assert "rotation" in lw.inspect(ours, **SHOWN).left_out
    assert "by name" in found.left_out["sharpness"]
    assert "by name" in found.left_out["mode_connectivity"]


def test_another_architecture_is_refused(llama, make_llama, tmp_path):
    deeper = make_llama(tmp_path / "deeper", blocks=3)
    with pytest.raises(UserError, match=r"has no model.layers.2"):
        lw.inspect(deeper, "rotation", against=llama)
    narrow = nn.Sequential(nn.Linear(4, 5))
    with pytest.raises(UserError, match=r"\[5, 4\] in .* and \[6, 4\]"):
        lw.inspect(narrow, "rotation", against=nn.Sequential(nn.Linear(4, 6)))
    with pytest.raises(UserError, match="there is none"):
        lw.inspect(narrow, "rotation")


def test_one_layer_hardly_ever_has_a_barrier_all_together_do():
    """The paper's claim, on digits: two nets of other seeds, averaged layer by layer and whole."""
    pictures, first = _trained(0)
    _, second = _trained(1)
    found = lw.inspect(first, "barrier", against=second, calibration=pictures, cache=False)
    alone = list(found.scores["barrier"].values())
    truth = (first(pictures).log_softmax(1) + second(pictures).log_softmax(1)).argmax(dim=1)
    middle = _net()
    parts = zip(middle.parameters(), first.parameters(), second.parameters(), strict=True)
    for mixed, ours, theirs in parts:
        mixed.data = (ours.data + theirs.data) / 2
    with torch.no_grad():
        losses = [
            float(functional.cross_entropy(net(pictures), truth)) for net in (middle, first, second)
        ]
    whole = losses[0] - (losses[1] + losses[2]) / 2
    assert whole > 1
    assert max(alone) <= 0.7 * whole
    assert statistics.median(alone) <= 0.2 * whole


def _net():
    sides = (64, 128, 128, 128, 128, 128, 10)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sides)]
    return nn.Sequential(*(part for one in layers for part in (one, nn.ReLU())))[:-1]


def _trained(seed):
    """Test pictures, and a net that tells them apart."""
    pixels, classes = load_digits(return_X_y=True)
    pictures, labels = torch.tensor(pixels / 16).float(), torch.tensor(classes)
    torch.manual_seed(seed)
    net = _net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(40):
        for part in torch.randperm(1200).split(64):
            loss_ = functional.cross_entropy(net(pictures[part]), labels[part])
            optimizer.zero_grad()
            loss_.backward()
            optimizer.step()
    return pictures[1200:], net.eval().requires_grad_(False)
