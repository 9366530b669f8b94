import torch

from layerwise.sparsify.shortv import shortv


def test_freezes_those_that_contribute_least():
    scores = torch.tensor([0.4, 0.0, 2.0, 0.1, 0.3])
    assert shortv(scores, density=0.6).tolist() == [True, False, True, False, True]
    assert shortv(scores, density=0.01).tolist() == [False, False, True, False, False]
