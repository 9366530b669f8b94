"""Curvature of the loss by a layer's weights, against Hessians written out."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from transformers import AutoModelForCausalLM

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.measure.hessian_trace import hessian_trace
from layerwise.measure.sharpness import sharpness


def quadratic(matrix, shape):
    """The product with the Hessian of 1/2 w^T A w, for weights of a shape."""
    return lambda direction: (matrix @ direction.flatten().double()).float().reshape(shape)


def test_finds_the_top_eigenvalue_whatever_the_others():
    drawn = torch.randn(24, 24).double()
    for matrix in (drawn @ drawn.T, drawn + drawn.T, -drawn @ drawn.T):
        weight = torch.zeros(4, 6)
        top = float(torch.linalg.eigvalsh(matrix)[-1])
        found = sharpness(weight, quadratic(matrix, (4, 6)), steps=24, tolerance=0.0)
        assert found == pytest.approx(top, rel=1e-4, abs=1e-5)


def test_estimates_the_trace():
    drawn = torch.randn(24, 24).double()
    matrix = drawn @ drawn.T
    weight = torch.zeros(4, 6)
    found = hessian_trace(weight, quadratic(matrix, (4, 6)), draws=400)
    apart = matrix - matrix.diag().diag()
    error = math.sqrt(2 * float(apart.square().sum()) / 400)
    assert abs(found - float(matrix.trace())) < 3 * error
    diagonal = torch.arange(24.0).double().diag()
    assert hessian_trace(weight, quadratic(diagonal, (4, 6)), draws=1) == pytest.approx(276)
    mean = hessian_trace(weight, quadratic(diagonal, (4, 6)), draws=1, mean=True)
    assert mean == pytest.approx(276 / 24)


def test_a_loss_that_does_not_curve():
    weight = torch.zeros(3, 3)
    assert sharpness(weight, torch.zeros_like) == 0
    assert hessian_trace(weight, torch.zeros_like) == 0


@pytest.mark.parametrize(("measure", "how"), [(sharpness, "steps"), (hessian_trace, "draws")])
def test_no_product_finds_nothing(measure, how):
    with pytest.raises(UserError, match="0 "):
        measure(torch.zeros(2, 2), torch.zeros_like, **{how: 0})


def written_out(model, name, pictures, loss):
    """The Hessian of a loss by one weight, entry by entry."""
    weight = dict(model.named_parameters())[name].detach()

    def of(flat):
        return loss(functional_call(model, {name: flat.reshape(weight.shape)}, (pictures,)))

    return torch.autograd.functional.hessian(of, weight.flatten())


def test_is_that_of_the_model_s_own_loss():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    pictures = torch.randn(40, 6)
    likeliest = model(pictures).argmax(dim=1)
    options = {"measure/hessian_trace": {"draws": 200}}
    names = ["sharpness", "hessian_trace"]
    found = lw.inspect(model, names, calibration=pictures, options=options, cache=False).scores
    for layer in ("0", "2"):
        hessian = written_out(
            model, f"{layer}.weight", pictures, lambda a: functional.cross_entropy(a, likeliest)
        )
        top, trace = float(torch.linalg.eigvalsh(hessian)[-1]), float(hessian.trace())
        assert found["sharpness"][layer] == pytest.approx(top, rel=1e-2)
        apart = hessian - hessian.diag().diag()
        error = math.sqrt(2 * float(apart.square().sum()) / 200)
        assert abs(found["hessian_trace"][layer] - trace) < 3 * error + 1e-6


def test_a_budget_can_be_shared_out_by_it(llama):
    ids = torch.arange(4 * 16).remainder(50).reshape(4, 16)
    options = {"measure/hessian_trace": {"draws": 1}}
    shown = {"calibration": ids, "samples": 4, "length": 16, "cache": False, "options": options}
    wish = {"budget": "4bits", "group": 16, "allocate": "threshold", "measure": "hessian_trace"}
    plan = lw.plan(llama, **shown, **wish)
    assert len({layer.bits for layer in plan.layers.values()}) > 1
    with pytest.raises(UserError, match="there is none"):
        lw.plan(llama, **shown, **{**wish, "measure": "rotation"})


def test_sees_through_the_blocks_of_a_language_model(llama):
    ids = torch.arange(2 * 12).remainder(7).reshape(2, 12)
    shown = {"calibration": ids, "samples": 2, "length": 12, "cache": False}
    layer = "model.layers.0.self_attn.k_proj"
    options = {"measure/hessian_trace": {"draws": 1}}
    found = lw.inspect(llama, "hessian_trace", options=options, **shown).scores["hessian_trace"]
    model = AutoModelForCausalLM.from_pretrained(
        llama, dtype=torch.float32, attn_implementation="eager"
    )
    weight = model.get_parameter(f"{layer}.weight")
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    loss = functional.cross_entropy(logits, ids[:, 1:].flatten())
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, weight.shape, generator=generator).float() * 2 - 1
    (slope,) = torch.autograd.grad(loss, weight, create_graph=True)
    (turned,) = torch.autograd.grad((slope * signs).sum(), weight)
    assert found[layer] == pytest.approx(float((turned * signs).sum()), rel=1e-3)
