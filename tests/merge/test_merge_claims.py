"""Claims of cards on digits that are no ratio of two losses, on one of the seeds of each."""

import json

import pytest
import torch
from torch import nn

import layerwise as lw
from layerwise.testing import relations


@pytest.mark.trained
def test_wise_ft_rights_what_both_get_wrong_and_keeps_its_own_pictures():
    """Card 066, A, B and C: FalseFalseTrue outweighs TrueTrueFalse."""
    images, labels = relations.digits(train=False)
    start, tuned = relations.narrowed(0)
    between = relations.merged("wise_ft", [tuned], {}, base=start)
    own = [relations.error(one, images, labels) for one in (tuned, between)]
    assert own[1] <= own[0] + 0.01
    assert relations.shifted_error(between) <= relations.shifted_error(tuned) - 0.03
    righted = spoiled = 0
    for turn in (30.0, -30.0):
        shown = relations.spoiled(images, "turn", turn)
        first, second, third = (
            one(shown).argmax(dim=1) == labels for one in (start, tuned, between)
        )
        righted += int((~first & ~second & third).sum())
        spoiled += int((first & second & ~third).sum())
    assert righted > spoiled
    start, smoothed = relations.narrowed(0, 0.1)
    bang = relations.merged("wise_ft", [smoothed], {}, base=start)
    assert relations.shifted_error(bang) <= relations.shifted_error(between) - 0.004


@pytest.mark.trained
def test_the_arc_and_the_chord_agree_where_tensors_lie_alike():
    """Card 920, C: every cosine is 0.8 or more, and accuracies are within a point."""
    images, labels = relations.digits(train=False)
    models = relations.cooks(0, "specialists")
    cosines = [
        float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))
        for a, b in zip(*(one.parameters() for one in models), strict=True)
        if a.dim() > 1
    ]
    assert min(cosines) >= 0.8
    shown = [relations.spoiled(images, "turn", turn) for turn in (20.0, -20.0)]
    linear, slerp = (
        sum(relations.error(relations.merged(m, models, {}), one, labels) for one in shown) / 2
        for m in ("linear", "slerp")
    )
    assert abs(linear - slerp) <= 0.01


def chain(seed):
    torch.manual_seed(seed)
    parts = nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3)
    return nn.Sequential(*parts).eval().requires_grad_(False)


@pytest.mark.parametrize("host", [0, 1])
@pytest.mark.parametrize("layers", [(), ("2",), ("0", "2"), ("0", "2", "4")])
def test_a_group_of_layers_is_averaged_in_one_host(host, layers, tmp_path):
    """Card 021: all but the group stays the host's bit for bit; all layers are the plain merge."""
    models = [chain(1), chain(2)]
    alone = [1.0, 0.0] if host == 0 else [0.0, 1.0]
    rules = {"*": {"weights": alone}} | {f"{one}.*": {"weights": [1.0, 1.0]} for one in layers}
    plan = tmp_path / "plan.yaml"
    plan.write_text(json.dumps({"method": "linear", "tensors": rules}))
    inputs = torch.randn(40, 6)
    labels = torch.randint(3, (40,))

    def loss(model):
        return float(nn.functional.cross_entropy(model(inputs), labels))

    report = lw.merge(models, tmp_path / "out", plan=plan, loss=loss)
    made = lw.load(tmp_path / "out", into=models[0])
    expected = {}
    for name, one in models[host].state_dict().items():
        if name[0] in layers:
            other = models[1 - host].state_dict()[name]
            expected[name] = (one + other) / 2
            torch.testing.assert_close(made.state_dict()[name], expected[name])
        else:
            assert torch.equal(made.state_dict()[name], one)
    scores = [one.loss for one in report.scores]
    assert scores[-1] == pytest.approx(loss(made))
    if len(layers) == 3:
        whole = lw.merge(models, tmp_path / "whole", loss=loss)
        assert whole.scores[-1].loss == pytest.approx(scores[-1], rel=1e-6)
    if not layers:
        assert scores[-1] == pytest.approx(scores[host])
