"""Second derivatives by changes of layers, against autograd through the whole model."""

import models
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.progress import Silent
from layerwise.core.running.hessian import Change, Divergence, divergence_shares, shares
from layerwise.core.running.runner import Runner

hessian = torch.autograd.functional.hessian


def changes_of(opened, size=0.05):
    generator = torch.Generator().manual_seed(0)
    made = []
    for layer in opened.structure.layers.values():
        weight = layer.read(opened.source).float()
        noise = torch.randn(weight.shape, generator=generator)
        made.append(Change(layer, weight, size * noise * weight.std()))
    return made


def interactions(loss, count):
    """The whole of M, row by row."""
    with sdpa_kernel(SDPBackend.MATH):
        return hessian(loss, torch.zeros(count))


def through_the_module(module, changes, shapes, ids):
    """The KL of a loaded module's answer, as a function of fractions of changes in its tensors."""
    weights = {name: value.detach() for name, value in module.named_parameters()}

    def scored(made):
        given = dict(weights)
        for change, part in zip(changes, made, strict=True):
            name = change.layer.tensor
            delta = change.layer.store(change.delta, shapes[name])
            given[name] = given[name] + part * delta
        answer = functional_call(module, given, (ids,))
        logits = getattr(answer, "logits", answer)
        return (logits[:, :-1] if logits.dim() > 2 else logits).log_softmax(-1)

    before = scored(torch.zeros(len(changes))).detach()

    def loss(made):
        after = scored(made)
        return (before.exp() * (before - after)).sum() / before[..., 0].numel()

    return loss


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox"])
def test_shares_are_half_the_rows_of_the_whole_hessian(kind, tmp_path):
    models.make(kind, tmp_path / "model")
    opened = lw.open(tmp_path / "model")
    changes, ids = changes_of(opened), models.inputs(kind)
    found = divergence_shares(Runner(opened.source, opened.structure), changes, ids, Silent())
    shapes = {name: info.shape for name, info in opened.source.tensors.items()}
    module = lw.load(tmp_path / "model").float()
    whole = interactions(through_the_module(module, changes, shapes, ids), len(changes))
    expected = whole.double().sum(1) / 2
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_interactions_are_symmetric_and_no_set_of_changes_brings_less_than_nothing(llama):
    opened = lw.open(llama)
    changes = changes_of(opened)
    ids = torch.arange(2 * 24).remainder(251).reshape(2, 24)
    answer = Runner(opened.source, opened.structure).differentiable("")
    loss = Divergence(answer, changes, ids)
    assert loss.seen == opened.structure.layers.keys()
    assert loss.predicted == 2 * 23
    assert float(loss(torch.zeros(len(changes)))) == pytest.approx(0, abs=1e-5)
    found = interactions(loss, len(changes))
    largest = float(found.abs().max())
    torch.testing.assert_close(found, found.T, rtol=0, atol=1e-5 * largest)
    # Where its gradient is zero, the Hessian of a KL is a Fisher information.
    assert float(torch.linalg.eigvalsh(found.double()).min()) > -1e-5 * largest
    off_diagonal = found - found.diag().diag()
    assert float(off_diagonal.abs().max()) > 0.01 * largest


def test_without_interactions_they_are_the_diagonal_method():
    curvature = torch.tensor([1.0, 0.2, 3.0])
    found = shares(lambda made: (curvature * made**2).sum() / 2 + made.sum(), 3)
    torch.testing.assert_close(found, curvature.double() / 2)


def test_of_a_quadratic_loss_they_add_up_to_its_change():
    """Layers side by side, whose sum has a squared error that is least as they are."""
    weights, deltas = torch.randn(2, 4, 6, 5)
    inputs = torch.randn(4, 5, 30)
    target = (weights @ inputs).sum(0)

    def loss(made):
        changed = weights + made[:, None, None] * deltas
        return ((changed @ inputs).sum(0) - target).square().sum() / 2

    found = shares(loss, 4)
    change = loss(torch.ones(4)) - loss(torch.zeros(4))
    assert float(found.sum()) == pytest.approx(float(change), rel=1e-5)
    assert float(hessian(loss, torch.zeros(4)).sum()) / 2 == pytest.approx(float(change), rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "vit"])
def test_they_foresee_the_divergence_of_small_changes(kind, tmp_path):
    models.make(kind, tmp_path / "model")
    opened = lw.open(tmp_path / "model")
    runner, ids = Runner(opened.source, opened.structure), models.inputs(kind)
    changes = changes_of(opened, 0.003)
    if kind == "mixtral":  # a router's choice has no derivative
        changes = [change for change in changes if ".1.mlp." in change.layer.name]
    found = divergence_shares(runner, changes, ids, Silent())
    loss = Divergence(runner.differentiable(""), changes, ids)
    with torch.no_grad():
        measured = float(loss(torch.ones(len(changes)))) / loss.predicted
    assert float(found.sum()) == pytest.approx(measured, rel=0.1)


def test_a_convolution_is_a_layer_too():
    module = models.convolutional()
    opened, images = lw.open(module), torch.randn(3, 3, 8, 8)
    changes = changes_of(opened)
    shapes = {name: info.shape for name, info in opened.source.tensors.items()}
    found = divergence_shares(Runner(opened.source, opened.structure), changes, images, Silent())
    whole = interactions(through_the_module(module, changes, shapes, images), len(changes))
    torch.testing.assert_close(found, whole.double().sum(1) / 2, rtol=1e-3, atol=1e-7)


def test_a_layer_that_multiplies_in_its_own_way_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.odd = nn.Linear(4, 3)

        def forward(self, inputs):
            return torch.einsum("...i,oi->...o", self.first(inputs), self.odd.weight)

    opened = lw.open(Odd())
    changes, ids = changes_of(opened), torch.randn(2, 4)
    with pytest.raises(UserError, match="odd was not seen"):
        divergence_shares(Runner(opened.source, opened.structure), changes, ids, Silent())
