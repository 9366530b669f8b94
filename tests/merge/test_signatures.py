"""Robust weight signatures: what they hold, their files, putting them on and taking them off."""

import copy
import json

import pytest
import torch
from relatives import relatives, weights_of
from safetensors.torch import save_file
from torch import nn

import layerwise as lw
from layerwise.cli import main
from layerwise.core.merging.signatures import depth_order, read_signature
from layerwise.merge.rws import rws
from layerwise.testing import relations


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3)
    ).eval()


@pytest.fixture
def models():
    """A start, a clean one and two corrupted ones."""
    return [network(seed) for seed in range(4)]


def floats(model):
    return {n: one for n, one in model.state_dict().items() if one.is_floating_point()}


def projected(start, clean, changed):
    a, d = (clean - start).double().flatten(), (changed - start).double().flatten()
    outer = a[:, None] * a[None, :] / (a @ a)
    return ((torch.eye(len(a), dtype=torch.float64) - outer) @ d).reshape(start.shape)


def test_is_its_definition(models):
    start, clean, one, two = map(floats, models)
    shares = torch.tensor([9.0, 1.0, 3.0])
    merged = rws([clean, one, two], start, shares, 0, layers=2, scale=0.7)
    for name in ("0.weight", "0.bias", "3.weight", "3.bias"):
        parts = [projected(start[name], clean[name], c[name]) for c in (one, two)]
        expected = clean[name].double() + 0.7 * (0.25 * parts[0] + 0.75 * parts[1])
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(merged["5.weight"], clean["5.weight"])
    norm = "1.running_var"
    moved = 0.25 * (one[norm] - clean[norm]) + 0.75 * (two[norm] - clean[norm])
    torch.testing.assert_close(merged[norm], clean[norm] + 0.7 * moved)


def test_is_orthogonal_to_what_clean_data_taught(models):
    start, clean, one, _ = models
    found = lw.signature(start, clean, one, layers=3)
    for name, change in found.tensors.items():
        if not name.startswith("1."):
            along = (clean.state_dict()[name] - start.state_dict()[name]).double()
            cosine = (along * change).sum() / (along.norm() * change.double().norm())
            assert abs(float(cosine)) < 1e-5, name


def test_a_layer_that_was_frozen_has_nothing_taken_away(models):
    start, clean, one = models[0], copy.deepcopy(models[0]), models[2]
    merged = rws([floats(clean), floats(one)], floats(start), torch.ones(2), 0, layers=1)
    torch.testing.assert_close(merged["0.weight"], one.state_dict()["0.weight"])


def test_more_layers_than_there_are_are_refused(models):
    with pytest.raises(lw.UserError, match="4 layers cannot be kept of 3"):
        lw.signature(*models[:3], layers=4)
    with pytest.raises(lw.UserError, match="matches no tensor"):
        lw.signature(*models[:3], pattern="conv9.*")
    with pytest.raises(lw.UserError, match="there is no other"):
        rws([floats(models[1])], floats(models[0]), torch.ones(1), 0)


def test_depth_is_read_from_names():
    shapes = {
        "lm_head.weight": (9, 4),
        "model.embed_tokens.weight": (9, 4),
        "model.layers.0.up.weight": (4, 4),
        "model.layers.10.up.weight": (4, 4),
        "model.layers.2.up.weight": (4, 4),
        "model.norm.weight": (4,),
    }
    layers = ["model.layers.0", "model.layers.2", "model.layers.10"]
    assert list(depth_order(shapes)) == ["model.embed_tokens", *layers, "lm_head"]


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_a_file_holds_what_was_taken(models, bits, tmp_path):
    file = tmp_path / "noise.safetensors"
    made = lw.signature(*models[:3], file, layers=1, bits=bits)
    found = read_signature(file)
    assert found.bits == bits
    assert found.apart.keys() == {"0", "3", "5"}
    exact = lw.signature(*models[:3], layers=1).tensors
    for name, one in exact.items():
        assert torch.equal(found.tensors[name], made.tensors[name])
        # A point of an even grid is at most half a step away.
        step = float(one.max() - one.min()) / (2**bits - 1) if bits else 0.0
        assert float((found.tensors[name] - one).abs().max()) <= step / 2 * (1 + 1e-5)
    with pytest.raises(lw.UserError, match="exists already"):
        lw.signature(*models[:3], file)


def test_what_was_put_on_comes_off_bit_for_bit(models):
    target = network(9).to(torch.bfloat16)
    before = {name: one.clone() for name, one in target.state_dict().items()}
    signatures = [lw.signature(*models[:2], other, layers=1) for other in models[2:]]
    put = lw.patch(target, signatures, [0.5, 0.25])
    changes = [one.tensors["0.weight"] for one in signatures]
    expected = before["0.weight"].float() + 0.5 * changes[0] + 0.25 * changes[1]
    assert torch.equal(target.state_dict()["0.weight"], expected.bfloat16())
    assert torch.equal(target.state_dict()["3.weight"], before["3.weight"])
    put.remove()
    assert all(torch.equal(one, before[name]) for name, one in target.state_dict().items())
    with lw.patch(target, signatures[:1]) as inside:
        assert not torch.equal(inside[0].weight, before["0.weight"])
    assert torch.equal(target[0].weight, before["0.weight"])
    with lw.patch(target, signatures, [0.0, 0.0]):
        assert torch.equal(target[0].weight, before["0.weight"])


def test_one_of_another_network_is_refused(models):
    found = lw.signature(*models[:3], layers=1)
    other = nn.Sequential(nn.Linear(6, 8))
    before = other[0].weight.clone()
    with pytest.raises(lw.UserError, match=r"changes 0.weight of shape \(9, 6\)"):
        lw.patch(other, [found])
    assert torch.equal(other[0].weight, before)
    with pytest.raises(lw.UserError, match="2 strengths were given for 1"):
        lw.patch(models[1], [found], [1.0, 2.0])


def test_a_merge_adds_signatures_to_another_model(models, tmp_path):
    files = [tmp_path / f"{n}.safetensors" for n in range(2)]
    made = [lw.signature(*models[:2], one, file, layers=1)
            for one, file in zip(models[2:], files, strict=True)]  # fmt: skip
    target = network(9)
    how = {"method": "task_arithmetic", "options": {"scale": 1.0}, "weights": [0.5, 2.0]}
    report = lw.merge(files, tmp_path / "out", base=target, **how)
    assert report.models == [str(file) for file in files]
    merged = lw.load(tmp_path / "out", into=target).state_dict()
    change = 0.5 * made[0].tensors["0.weight"] + 2 * made[1].tensors["0.weight"]
    torch.testing.assert_close(merged["0.weight"], target.state_dict()["0.weight"] + change)
    assert torch.equal(merged["3.weight"], target.state_dict()["3.weight"])
    with pytest.raises(lw.UserError, match="is a signature, and there is no model to add it to"):
        lw.merge([*files, *models[2:]], tmp_path / "again")
    with pytest.raises(lw.UserError, match="has none such"):
        lw.merge(files, tmp_path / "again", base=nn.Linear(3, 3), **how)


def test_the_first_model_is_the_clean_one_whatever_the_content(models, tmp_path):
    start, clean, one, two = models
    for place, others in enumerate(((clean, one, two), (two, clean, one))):
        out = tmp_path / str(place)
        lw.merge(others, out, base=start, method="rws", options={"layers": 1})
        merged = lw.load(out, into=start).state_dict()
        first = others[0].state_dict()
        assert torch.equal(merged["5.weight"], first["5.weight"])
        assert not torch.equal(merged["0.weight"], first["0.weight"])


def test_the_commands(llama, tmp_path, capsys):
    start, clean, noisy = relatives(tmp_path, llama, 2)
    file = tmp_path / "noise.safetensors"
    given = ["signature", str(start), str(clean), str(noisy), "-o", str(file), "--layers", "2"]
    assert main([*given, "--bits", "8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["apart"].keys() == {"model.embed_tokens", "model.layers.0", "model.layers.1"}
    assert 0 < told["bytes"] < file.stat().st_size
    how = ["--method", "task_arithmetic", "--task_arithmetic-scale", "1"]
    out = tmp_path / "out"
    assert main(["merge", str(file), "--base", str(clean), "-o", str(out), *how]) == 0
    merged, before = weights_of(out), weights_of(clean)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(merged[name], before[name])
    name = "model.layers.0.mlp.up_proj.weight"
    change = read_signature(file).tensors[name]
    torch.testing.assert_close(merged[name], before[name] + change)
    assert main([*given[:3], str(tmp_path), "-o", str(tmp_path / "x.safetensors")]) == 2


def test_what_is_no_signature_is_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(lw.UserError, match="is no signature"):
        read_signature(tmp_path / "a.safetensors")
    with pytest.raises(lw.UserError, match="no name for a signature"):
        lw.signature(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), tmp_path / "a.pt")


@pytest.mark.trained
def test_the_first_layer_carries_the_corruption_and_the_projection_spares_the_clean_accuracy():
    """Card 043: the first layer is furthest apart, and less is lost on clean data than by it."""
    images, labels = relations.digits(train=False)
    start, clean, other = relations.corrupted(0, "noise")
    found = lw.signature(start, clean, other, layers=1, bits=8)
    assert max(found.apart, key=found.apart.__getitem__) == "0"
    kept = sum(one.numel() for one in found.tensors.values())
    assert kept / sum(one.numel() for one in clean.parameters()) < 0.21
    swapped = copy.deepcopy(clean)
    swapped[0].load_state_dict(other[0].state_dict())
    noisy = relations.spoiled(images, "noise")
    before = relations.error(clean, noisy, labels)
    with lw.patch(clean, [found]):
        assert relations.error(clean, noisy, labels) < before
        spared = relations.error(clean, images, labels)
    assert spared <= relations.error(swapped, images, labels) + 0.01
