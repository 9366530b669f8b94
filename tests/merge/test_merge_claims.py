"""Claims of cards on digits that are no ratio of two losses, on one of the seeds of each."""

import pytest
import torch

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
