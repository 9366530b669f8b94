"""Gradients that go back block by block, against autograd through the whole model."""

import models
import pytest
import torch
from torch import nn

import layerwise as lw
from layerwise.core.fisher import output_fisher
from layerwise.core.progress import Silent
from layerwise.core.runner import Runner


def by_autograd(module, layers, ids):
    """Squared gradients of the outputs of modules, summed over positions."""
    outputs = {}

    def keep(name):
        def hook(_module, _inputs, output):
            output.retain_grad()
            outputs[name] = output

        return hook

    for name, part in module.named_modules():
        if name in layers:
            part.register_forward_hook(keep(name))
    answer = module(ids)
    logits = getattr(answer, "logits", answer)
    scored = (logits[:, :-1] if logits.dim() > 2 else logits).log_softmax(-1).flatten(0, -2)
    generator = torch.Generator().manual_seed(0)
    drawn = scored.detach().exp().multinomial(1, generator=generator)
    scored.gather(1, drawn).sum().backward()
    across = {n: 1 if out.dim() == 4 else -1 for n, out in outputs.items()}
    return {
        name: out.grad.movedim(across[name], -1).flatten(0, -2).square().sum(0) / len(scored)
        for name, out in outputs.items()
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox"])
def test_it_is_the_gradient_through_the_whole_model(kind, tmp_path):
    models.make(kind, tmp_path / "model")
    opened = lw.open(tmp_path / "model")
    ids = models.inputs(kind)
    layers = list(opened.structure.layers.values())
    found = output_fisher(Runner(opened.source, opened.structure), layers, ids, Silent())
    expected = by_autograd(lw.load(tmp_path / "model"), opened.structure.layers, ids)
    assert found.keys() == opened.structure.layers.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-3, atol=1e-7)


def test_a_module_that_runs_as_a_whole():
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    opened, images = lw.open(module), torch.randn(6, 3, 8, 8)
    layers = list(opened.structure.layers.values())
    found = output_fisher(Runner(opened.source, opened.structure), layers, images, Silent())
    for name, value in by_autograd(module, opened.structure.layers, images).items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-3, atol=1e-7)


def test_it_foresees_the_divergence_of_a_small_change(llama):
    """KL ~ 1/2 sum_o f_o e_o, for noise on one layer's outputs that is small and uncorrelated."""
    opened = lw.open(llama)
    runner = Runner(opened.source, opened.structure)
    ids = torch.arange(32 * 32).remainder(251).reshape(32, 32)
    layer = opened.structure.layers["model.layers.1.mlp.down_proj"]
    fisher = output_fisher(runner, [layer], ids, Silent())[layer.name]
    before = runner.forward("model.layers.0", runner.start(ids), {})
    after = runner.forward("model.layers.1", before, {})
    noise = torch.randn(after.shape) * 0.05
    logits = [torch.cat(list(runner.logits(one, ids, {}))) for one in (after, after + noise)]
    p, q = (one[:, :-1].log_softmax(-1) for one in logits)
    measured = nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
    foreseen = (fisher * noise.square().mean(dim=(0, 1))).sum() / 2
    assert float(foreseen) == pytest.approx(float(measured), rel=0.15)
