import torch

from layerwise.allocate.threshold import threshold


def test_equal_blocks_get_two_widths_by_rank():
    scores = torch.tensor([-0.9, -0.2, -0.7, -0.5])
    costs = [torch.tensor([20, 40])] * 4
    for low in range(5):
        levels = threshold(scores, costs, budget=20 * low + 40 * (4 - low))
        assert set(levels.topk(4 - low).indices.tolist()) == set(
            scores.topk(4 - low).indices.tolist()
        )
        assert int(levels.sum()) == 4 - low


def test_starts_from_the_highest_common_level():
    costs = [torch.tensor([2, 3, 4])] * 3
    assert threshold(torch.tensor([1.0, 3.0, 2.0]), costs, budget=10).tolist() == [1, 2, 1]


def test_stops_at_the_first_item_that_does_not_fit():
    costs = [torch.tensor([1, 2]), torch.tensor([1, 9]), torch.tensor([1, 2])]
    assert threshold(torch.tensor([1.0, 2.0, 3.0]), costs, budget=5).tolist() == [0, 0, 1]


def test_equal_scores_are_raised_in_order():
    costs = [torch.tensor([1, 2])] * 3
    assert threshold(torch.zeros(3), costs, budget=5).tolist() == [1, 1, 0]
