import pytest
import torch

from layerwise.core.errors import UserError
from layerwise.measure.skip_effect import skip_effect


def _given(later=3):
    answers, skipped, frozen = (2 * torch.randn(3, 5, 8, 11)).log_softmax(dim=-1)
    effects = torch.rand(2, later, 5, 8)
    return answers, skipped, frozen, *effects


@pytest.mark.parametrize("over", ["max", "mean"])
def test_is_what_the_definition_says(over):
    answers, skipped, frozen, effects, freeze_effects = _given()

    def of_windows(values, start):
        seen = [[float(one) for one in window[start:]] for window in values]
        each = [max(one) if over == "max" else sum(one) / len(one) for one in seen]
        return sum(each) / len(each)

    def moved(changed):
        return [
            [float((p.exp() - q.exp()).square().sum().sqrt()) for p, q in zip(*pair, strict=True)]
            for pair in zip(answers, changed, strict=True)
        ]

    expected = {
        "output": of_windows(moved(skipped), 1),
        "later": sum(of_windows(one, 1) for one in effects) / 3,
        "future_output": of_windows(moved(frozen), 4),
        "future": sum(of_windows(one, 4) for one in freeze_effects) / 3,
    }
    parts = (part.split(2) for part in (answers, skipped, frozen))
    found = skip_effect(*parts, effects, freeze_effects, over=over)
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_last_block_has_no_later_ones():
    *parts, effects, freeze_effects = _given(later=0)
    found = skip_effect(*([part] for part in parts), effects, freeze_effects)
    assert found["later"] == found["future"] == 0
    assert found["output"] > 0


def test_refuses_what_is_no_statistic():
    *parts, effects, freeze_effects = _given()
    with pytest.raises(UserError, match="median"):
        skip_effect(*([part] for part in parts), effects, freeze_effects, over="median")
