"""PLeaS: least squares after matching, against the same solved on the features themselves."""

import copy

import pytest
import torch
from relatives import weights_of, with_weights
from torch import nn

import layerwise as lw
from layerwise.core.merging.matching import matched, permuted
from layerwise.core.reading.checkpoint import module_source, open_checkpoint
from layerwise.core.reading.symmetry import symmetries
from layerwise.testing import relations


def chain(seed):
    torch.manual_seed(seed)
    parts = nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3, bias=False)
    return nn.Sequential(*parts).eval().requires_grad_(False)


def shuffled(state, known):
    orders = {one.name: torch.randperm(one.units(state)) for one in known}
    return {name: permuted(name, one, known, orders) for name, one in state.items()}


def read_by(model, inputs):
    """What each linear layer reads, and what it answers."""
    seen = {}
    for place, part in enumerate(model):
        before, inputs = inputs, part(inputs)
        if isinstance(part, nn.Linear):
            seen[str(place)] = before.double(), inputs.double()
    return seen


def test_is_the_least_squares_fit_on_the_features(tmp_path):
    models, inputs, ridge = [chain(1), chain(2)], torch.randn(200, 6), 1e-2
    lw.merge(models, tmp_path / "out", method="pleas", calibration=inputs, samples=200,
             options={"ridge": ridge})  # fmt: skip
    made = lw.load(tmp_path / "out", into=models[0])
    known = symmetries(module_source(models[0]))
    # The first network is the one of which the result's first rows are nearer.
    ways = []
    for one, other in (models, models[::-1]):
        orders = matched(one.state_dict(), other.state_dict(), known)
        turned = copy.deepcopy(other)
        state = {n: permuted(n, t, known, orders) for n, t in other.state_dict().items()}
        turned.load_state_dict(state)
        ways.append(slow([one, turned], inputs, ridge))
    found = made.state_dict()
    misses = [max(float((found[n] - t).abs().max()) for n, t in way.items()) for way in ways]
    assert min(misses) < 1e-4
    assert max(misses) > 1e-2


def slow(models, inputs, ridge):
    """Ridge regression by stacked rows; the targets and the features are the models' means."""
    found = {}
    seen = [read_by(model, inputs) for model in models]
    for name in seen[0]:
        z, o = ((seen[0][name][n] + seen[1][name][n]) / 2 for n in (0, 1))
        weight = sum(m[int(name)].weight.double() for m in models) / 2
        biases = [m[int(name)].bias for m in models]
        rows, anchor = z, weight.T
        if biases[0] is not None:
            rows = torch.cat([z, torch.ones(len(z), 1).double()], dim=1)
            anchor = torch.cat([weight.T, sum(b.double() for b in biases)[None] / 2])
        pull = (len(z) * ridge * z.square().mean()).sqrt()
        system = torch.cat([rows, pull * torch.eye(rows.shape[1]).double()])
        solved = torch.linalg.lstsq(system, torch.cat([o, pull * anchor])).solution.float()
        found[f"{name}.weight"] = solved[: z.shape[1]].T
        if biases[0] is not None:
            found[f"{name}.bias"] = solved[-1]
    return found


def test_a_permuted_copy_is_the_same_function(tmp_path):
    first, inputs = chain(1), torch.randn(60, 6)
    other = copy.deepcopy(first)
    other.load_state_dict(shuffled(first.state_dict(), symmetries(module_source(first))))
    lw.merge([first, other], tmp_path / "out", method="pleas", calibration=inputs)
    made = lw.load(tmp_path / "out", into=first)
    torch.testing.assert_close(made(inputs), first(inputs), rtol=1e-4, atol=1e-5)


def test_convolutions_are_fitted(tmp_path):
    def net(seed):
        torch.manual_seed(seed)
        model = nn.Module()
        model.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        model.bn1 = nn.BatchNorm2d(4)
        model.layer1 = nn.Sequential(nn.Module())
        inner = model.layer1[0]
        inner.conv1, inner.conv2 = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        inner.bn1, inner.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        model.fc = nn.Linear(4, 5)
        return Small(model).eval().requires_grad_(False)

    models, images = [net(1), net(2)], torch.randn(16, 3, 6, 6)
    for name, ridge in (("free", 1e-9), ("tight", 1e6)):
        lw.merge(models, tmp_path / name, method="pleas", calibration=images,
                 options={"ridge": ridge})  # fmt: skip
    lw.merge(models, tmp_path / "matched", method="weight_matching")
    free, tight, plain = (
        lw.load(tmp_path / name, into=models[0]).state_dict()
        for name in ("free", "tight", "matched")
    )
    for name, one in plain.items():
        torch.testing.assert_close(tight[name], one, rtol=1e-4, atol=1e-4)
    # All networks see the same image: the first filters need no fit.
    torch.testing.assert_close(free["conv1.weight"], plain["conv1.weight"], rtol=1e-4, atol=1e-4)
    name = "layer1.0.conv2.weight"
    assert float((free[name] - plain[name]).norm() / plain[name].norm()) > 0.05


class Small(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.conv1, self.bn1, self.layer1, self.fc = parts.conv1, parts.bn1, parts.layer1, parts.fc

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        block = self.layer1[0]
        x = (block.bn2(block.conv2(block.bn1(block.conv1(x)).relu())) + x).relu()
        return self.fc(x.mean((2, 3)))


def test_a_permuted_llama_is_the_same_function(llama, tmp_path, text):
    known = symmetries(open_checkpoint(llama))
    other = with_weights(tmp_path / "other", llama, shuffled(weights_of(llama), known))
    lw.merge([llama, other], tmp_path / "out", method="pleas", calibration=str(text), samples=4,
             length=32)  # fmt: skip
    ids = torch.arange(20)[None] * 7
    before, after = (lw.load(one)(ids).logits for one in (llama, tmp_path / "out"))
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_what_it_cannot_do_is_refused(tmp_path):
    models, inputs = [chain(1), chain(2)], torch.randn(20, 6)
    with pytest.raises(lw.UserError, match="none was given"):
        lw.merge(models, tmp_path / "out", method="pleas")
    with pytest.raises(lw.UserError, match="are to answer to the same one"):
        lw.merge(models, tmp_path / "out", method="pleas", calibration=[inputs, inputs])
    with pytest.raises(lw.UserError, match="a ridge of -1"):
        lw.merge(models, tmp_path / "out", method="pleas", calibration=inputs,
                 options={"ridge": -1.0})  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.trained
def test_fitting_brings_back_what_matching_leaves():
    """Card 030 on digits, one of the three seeds of the claim."""
    images, labels = relations.digits(train=False)
    shown, _ = relations.digits(train=True)
    pair = relations.twins(0, 64)
    plain, turned, fitted = (
        relations.error(relations.merged(method, pair, {}, inputs=shown), images, labels)
        for method in ("linear", "weight_matching", "pleas")
    )
    assert fitted < turned < plain - 0.12
