"""The loop that moves errors on, with a grid of its own for each column."""

import gc

import torch

from layerwise.quantize._feedback import factorize, feed_back
from layerwise.quantize.gptq import gptq


class Halves:
    """Rounds to multiples of a step that doubles from column to column."""

    def __init__(self):
        self.asked, self.fitted = [], {}

    def fit(self, start, columns):
        self.fitted[start] = columns.clone()

    def round(self, j, column):
        self.asked.append(j)
        step = 0.1 * 2 ** (j % 4)
        return (column / step).round() * step


def problem(rows=9, width=70):
    noise = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, width, generator=noise)
    inputs += inputs[:, :1]
    return torch.randn(rows, width, generator=noise), inputs.T @ inputs / 200


def by_definition(weight, gram):
    """The columns in turn, in float64, with the inverse of the damped matrix.

    What each missed, what they were rounded to, the damped matrix, and all columns as they were
    when each was reached.
    """
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(len(gram))
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, missed = weight.double().T.clone(), torch.zeros(weight.shape[1], len(weight)).double()
    rounded, rounder, reached = torch.zeros_like(left), Halves(), []
    for j in range(len(left)):
        reached.append(left.clone())
        rounded[j] = rounder.round(j, left[j])
        missed[j] = left[j] - rounded[j]
        for k in range(j + 1, len(left)):
            left[k] -= missed[j] / factor[j, j] * factor[j, k]
    return missed, rounded, damped, reached


def test_any_rounding_of_columns_can_be_used():
    weight, gram = problem()
    rounder = Halves()
    missed = feed_back(weight, factorize(gram, 0.01), rounder, 1000)
    slowly, *_ = by_definition(weight, gram)
    torch.testing.assert_close(missed.double(), slowly, rtol=0, atol=1e-5)
    assert rounder.asked == list(range(70))


def test_a_group_is_fitted_to_what_its_columns_had_best_be():
    weight, gram = problem()
    rounder = Halves()
    feed_back(weight, factorize(gram, 0.01), rounder, 16)
    *_, reached = by_definition(weight, gram)
    assert list(rounder.fitted) == [0, 16, 32, 48, 64]
    for start, columns in rounder.fitted.items():
        best = reached[start][start : start + 16]
        torch.testing.assert_close(columns.double(), best, rtol=0, atol=1e-5)


def test_the_loss_left_is_what_each_column_missed_by_its_importance():
    weight, gram = problem()
    factored = factorize(gram, 0.01)
    _, rounded, damped, _ = by_definition(weight, gram)
    ours = feed_back(weight, factored, Halves(), 8)
    error = rounded.T - weight.double()
    loss = (error @ damped * error).sum()
    summed = (ours.square().sum(dim=1) * factored.importance).sum().double()
    torch.testing.assert_close(summed, loss, rtol=1e-5, atol=0)


def test_dead_inputs_are_named_where_they_lie():
    _, gram = problem()
    gram[[3, 8]] = 0.0
    gram[:, [3, 8]] = 0.0
    for act_order in (False, True):
        assert factorize(gram, 0.01, act_order).dead.nonzero().flatten().tolist() == [3, 8]


def test_nothing_waits_for_the_garbage_collector():
    """Matrices of the size of a layer that lie in a cycle would add up over the layers."""
    inputs = torch.randn(200, 160, generator=torch.Generator().manual_seed(0))
    weight, gram = torch.randn(8, 160), inputs.T @ inputs / 200
    gptq(weight, gram, bits=4, group=32)  # what is made once for good
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gptq(weight, gram.clone(), bits=4, group=32)
        gc.collect()
        left = [one for one in gc.garbage if isinstance(one, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert not left
