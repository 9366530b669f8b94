import pytest
import torch
from torch.nn import functional

from layerwise.core.errors import UserError
from layerwise.measure.ecoflap import ecoflap


def test_is_what_the_draws_of_the_paper_estimate():
    inputs, weight, head = torch.randn(50, 12), torch.randn(8, 12), torch.randn(5, 8).double()
    labels = torch.randint(0, 5, (50,))

    def loss(matrix):
        hidden = (inputs.double() @ matrix.T).tanh()
        return functional.cross_entropy(hidden @ head.T, labels)

    double = weight.double().requires_grad_()
    (grad,) = torch.autograd.grad(loss(double), double)
    draws, eps = 0.0, 1e-3
    for _ in range(600):
        noise = torch.randn(weight.shape, dtype=torch.float64)
        up, down = (float(loss(double.detach() + sign * eps * noise)) for sign in (1, -1))
        draws += abs(up - down) / (2 * eps) / 600
    assert ecoflap(grad.float()) == pytest.approx(draws, rel=0.12)


def test_a_layer_that_the_loss_ignores_scores_nothing():
    assert ecoflap(torch.zeros(4, 6)) == 0


def test_refuses_a_gradient_that_is_no_number():
    with pytest.raises(UserError):
        ecoflap(torch.tensor([[1.0, float("nan")]]))
