"""What lies between two networks, and batch norms that are taken anew of what was merged."""

import copy

import pytest
import torch
from resnet import pictures
from torch import nn

import layerwise as lw
from layerwise.core.merging.connectivity import alignment, distance, rise
from layerwise.core.merging.matching import permuted
from layerwise.core.reading.checkpoint import module_source
from layerwise.core.reading.symmetry import symmetries
from layerwise.testing import relations


def chain(seed, width=12):
    torch.manual_seed(seed)
    parts = nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
    return nn.Sequential(*parts).eval().requires_grad_(False)


def shuffled(module):
    """The same function with its units in another order."""
    known = symmetries(module_source(module))
    state = {n: one for n, one in module.state_dict().items() if one.is_floating_point()}
    orders = {one.name: torch.randperm(one.units(state)) for one in known}
    made = copy.deepcopy(module)
    turned = {name: permuted(name, one, known, orders) for name, one in state.items()}
    made.load_state_dict(turned, strict=False)
    return made


def slow_alignment(first, second, gamma):
    alike = most = 0.0
    for name, one in first.items():
        if one.dim() < 2:
            continue
        u, s, v = torch.linalg.svd(one.double(), full_matrices=False)
        p, t, q = torch.linalg.svd(second[name].double(), full_matrices=False)
        for i in range(len(s)):
            for j in range(len(t)):
                if s[i] >= gamma * s[0] and t[j] >= gamma * t[0]:
                    alike += float(s[i] * t[j] * (u[:, i] @ p[:, j]) * (v[i] @ q[j]))
            if s[i] >= gamma * s[0] and t[i] >= gamma * t[0]:
                most += float(s[i] * t[i])
    return alike / most


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_alignment_is_its_definition(gamma):
    first, second = chain(1).state_dict(), chain(2).state_dict()
    assert alignment(first, second, gamma) == pytest.approx(slow_alignment(first, second, gamma))


def test_alignment_at_its_ends():
    state = chain(1).state_dict()
    assert alignment(state, {name: 3 * one for name, one in state.items()}) == pytest.approx(1)
    matrices = {name: one for name, one in state.items() if one.dim() > 1}
    other = {name: torch.randn_like(one) for name, one in matrices.items()}
    values = [torch.linalg.svdvals(one[name].double()) for one in (matrices, other)
              for name in matrices]  # fmt: skip
    pairs = zip(values[:3], values[3:], strict=True)
    most = sum(float((s * t).sum()) for s, t in pairs)
    squares = sum(float(one.square().sum()) for one in values)
    expected = squares - 2 * alignment(matrices, other) * most
    assert distance(matrices, other) ** 2 == pytest.approx(expected)
    with pytest.raises(lw.UserError, match="no layer"):
        alignment({"a": torch.ones(3)}, {"a": torch.ones(3)})


def test_a_rise_is_above_the_line():
    assert rise([1.0, 4.0, 2.0]) == pytest.approx(2.5)
    assert rise([3.0, 2.0, 1.0]) == 0
    with pytest.raises(lw.UserError, match="no ends"):
        rise([1.0])


def test_a_network_and_its_permutation_are_one():
    first, inputs = chain(1), torch.randn(40, 6)
    wanted = first(inputs)
    found = lw.connect(first, shuffled(first), lambda net: float((net(inputs) - wanted).norm()))
    assert found.before.barrier > 0.1
    assert found.after.barrier < 1e-4
    assert found.ratio == 0
    assert found.after.alignment == pytest.approx({0.0: 1, 0.3: 1})
    again = lw.connect(first, first, lambda net: 0.0)
    assert again.ratio == 0
    assert all(torch.equal(one, again.matched[n]) for n, one in first.state_dict().items())


def test_matching_leaves_outputs_and_singular_values():
    first, second, inputs = chain(1), chain(2), torch.randn(40, 6)
    found = lw.connect(first, second, lambda net: 0.0, points=2)
    turned = copy.deepcopy(second)
    turned.load_state_dict(dict(found.matched))
    torch.testing.assert_close(turned(inputs), second(inputs), rtol=1e-4, atol=1e-5)
    for name in ("0.weight", "2.weight", "4.weight"):
        before, after = (torch.linalg.svdvals(one.state_dict()[name]) for one in (second, turned))
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-6)
    with pytest.raises(lw.UserError, match="one architecture"):
        lw.connect(first, chain(1, 13), lambda net: 0.0)


def normed(seed):
    torch.manual_seed(seed)
    parts = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)
    return nn.Sequential(*parts).eval().requires_grad_(False)


def test_statistics_are_those_of_the_result(tmp_path):
    models, inputs = [normed(1), normed(2)], 3 * torch.randn(500, 6) + 1
    report = lw.merge(models, tmp_path / "out", norms=inputs)
    made = lw.load(tmp_path / "out", into=models[0])
    seen = made[0](inputs)
    torch.testing.assert_close(made[1].running_mean, seen.mean(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made[1].running_var, seen.var(dim=0), rtol=1e-4, atol=1e-5)
    average = (models[0][0].weight + models[1][0].weight) / 2
    torch.testing.assert_close(made[0].weight, average)
    notes = {row.tensor: row.note for row in report.rows}
    assert notes["1.running_var"] == "taken anew of the result"
    assert not notes["0.weight"]
    with pytest.raises(lw.UserError, match="no batch norm"):
        lw.merge([chain(1), chain(2)], tmp_path / "again", norms=inputs)
    assert not (tmp_path / "again").exists()


def test_other_inputs_make_another_merge(tmp_path, monkeypatch):
    from layerwise.core.keeping.staging import Staging

    models = [normed(1), normed(2)]
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "publish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            lw.merge(models, tmp_path / "out", norms=torch.randn(20, 6))
    with pytest.raises(lw.UserError, match="other weights or other options"):
        lw.merge(models, tmp_path / "out", norms=torch.randn(20, 6))


@pytest.mark.trained
def test_matching_takes_the_barrier_away_and_hardly_the_distance():
    """Card 083 on digits, one of the three seeds of the claim."""
    images, labels = relations.digits(train=False)
    first, second = relations.twins(0, 256)
    found = lw.connect(first, second, lambda net: relations.cross_entropy(net, images, labels))
    assert found.after.barrier <= 0.15 * found.before.barrier
    assert found.ratio >= 0.7
    assert abs(found.before.alignment[0.0]) <= 0.05
    assert 0.3 <= found.after.alignment[0.0] < found.after.alignment[0.3]


@pytest.mark.trained
def test_a_merged_resnet_lives_by_its_batch_norms(tmp_path):
    """Units that do not agree: the mean of both networks' statistics leaves chance alone."""
    seen = pictures()
    other = shuffled(seen.net)
    held = seen._replace(held=seen.held[:200], labels=seen.labels[:200])
    found = {}
    for name, norms in (("merged", None), ("anew", seen.calibration[:64])):
        lw.merge([seen.net, other], tmp_path / name, norms=norms)
        found[name] = held.accuracy(lw.load(tmp_path / name, into=seen.net))
    assert found["merged"] < 0.2
    assert found["anew"] > found["merged"] + 0.1
    lw.merge([seen.net, other], tmp_path / "matched", method="weight_matching")
    matched, few = lw.load(tmp_path / "matched", into=seen.net), seen.held[:8]
    torch.testing.assert_close(matched(few), seen.net(few), rtol=1e-3, atol=1e-3)
