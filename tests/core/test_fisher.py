"""Gradients that go back block by block, against autograd through the whole model."""

import models
import pytest
import torch
from torch import nn

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.progress import Silent
from layerwise.core.running.carried import Shelf
from layerwise.core.running.fisher import GRADIENT_WINDOWS, WeightGradients, output_fisher
from layerwise.core.running.runner import Runner


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


def gradients_by_autograd(module, layers, ids, *, texts):
    """The mean loss's gradient with respect to the tensors of layers, as PyTorch has it."""
    for parameter in module.parameters():
        parameter.requires_grad_()
    answer = module(ids)
    logits = getattr(answer, "logits", answer)
    if texts:
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    else:
        scored = logits.flatten(0, -2)
        loss = nn.functional.cross_entropy(scored, scored.detach().argmax(-1))
    loss.backward()
    parameters = dict(module.named_parameters())
    return {
        name: layer.matrix(parameters[layer.tensor].grad.detach()) for name, layer in layers.items()
    }


def weight_gradients(opened, ids, shelf=Shelf(), leaving=()):  # noqa: B008
    runner = Runner(opened.source, opened.structure)
    made = WeightGradients(runner, ids, shelf)
    found = {}
    for block in runner.blocks:
        inside = [x for x in opened.structure.layers.values() if runner.whole or x.block == block]
        layers = [layer for layer in inside if layer.name not in leaving]
        found |= made.of(block, layers)
    made.drop()
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert"])
def test_gradients_of_weights_are_those_of_the_whole_model(kind, tmp_path):
    models.make(kind, tmp_path / "model")
    opened = lw.open(tmp_path / "model")
    ids = models.inputs(kind)
    found = weight_gradients(opened, ids)
    texts = kind in ("llama", "gpt2", "opt")
    module = models.built(kind)
    names = set(dict(module.named_parameters()))
    layers = {n: x for n, x in opened.structure.layers.items() if x.tensor in names}
    expected = gradients_by_autograd(module, layers, ids, texts=texts)
    assert found.keys() == opened.structure.layers.keys() >= expected.keys()
    assert len(expected) >= 8
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6)


def test_gradients_of_experts_are_seen_apart_and_those_no_token_reached_are_zero(tmp_path):
    models.make("mixtral", tmp_path / "model")
    opened = lw.open(tmp_path / "model")
    ids = models.inputs("mixtral")[:1, :2]
    found = weight_gradients(opened, ids)
    experts = {name: one for name, one in found.items() if "experts." in name}
    reached = [name for name, one in experts.items() if one.any()]
    assert 0 < len(reached) < len(experts)
    module = models.built("mixtral")
    for parameter in module.parameters():
        parameter.requires_grad_()
    nn.functional.cross_entropy(module(ids).logits[:, :-1].flatten(0, 1), ids[:, 1]).backward()
    inner = len(experts["model.layers.0.block_sparse_moe.experts.0.w1"])
    for number, block in enumerate(module.model.layers):
        # One matrix holds both that read the input.
        for expert, both in enumerate(block.mlp.experts.gate_up_proj.grad):
            name = f"model.layers.{number}.block_sparse_moe.experts.{expert}"
            expected = {"w1": both[:inner], "w3": both[inner:]}
            expected["w2"] = block.mlp.experts.down_proj.grad[expert]
            for part, value in expected.items():
                found_part = found[f"{name}.{part}"]
                torch.testing.assert_close(found_part, value, rtol=1e-3, atol=1e-6)


def test_experts_whose_matrices_lie_in_one_have_information_of_their_own(tmp_path):
    models.make("mixtral", tmp_path / "model")
    opened = lw.open(tmp_path / "model")
    layers = [one for one in opened.structure.layers.values() if "experts." in one.name]
    runner = Runner(opened.source, opened.structure)
    found = output_fisher(runner, layers, models.inputs("mixtral"), Silent())
    assert all(found[layer.name].shape == (layer.rows,) for layer in layers)
    assert not found[layers[0].name].equal(found[layers[2].name])


@pytest.mark.parametrize("kind", ["pictures", "tokens"])
def test_gradients_of_a_module_in_memory(kind):
    if kind == "pictures":
        module, ids = models.convolutional(), torch.randn(4, 3, 8, 8)
    else:
        module = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 16), nn.Tanh())
        module.append(nn.Linear(16, 20))
        ids = torch.randint(0, 20, (4, 9))
    opened = lw.open(module)
    # A table of embeddings multiplies nothing.
    leaving = {"0"} if kind == "tokens" else set()
    found = weight_gradients(opened, ids, leaving=leaving)
    layers = {n: x for n, x in opened.structure.layers.items() if n not in leaving}
    expected = gradients_by_autograd(module, layers, ids, texts=kind == "tokens")
    assert found.keys() == expected.keys() != set()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6)


def test_gradients_with_activations_on_disk_are_the_same(llama, tmp_path):
    opened, ids = lw.open(llama), torch.randint(0, 256, (20, 12))
    kept = weight_gradients(opened, ids, Shelf(tmp_path / "kept"))
    free = weight_gradients(opened, ids)
    assert all(kept[name].equal(value) for name, value in free.items())
    assert not (tmp_path / "kept").exists()
    # Of a long text only the first windows are used.
    few = weight_gradients(opened, ids[:GRADIENT_WINDOWS])
    assert all(few[name].equal(value) for name, value in free.items())


def test_a_grouped_convolution_and_a_layer_the_answer_ignores_are_refused():
    grouped = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.LazyLinear(5))
    grouped(torch.randn(1, 4, 6, 6))

    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.aside = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, inputs):
            self.aside(inputs)
            return self.used(inputs)

    with pytest.raises(UserError, match="grouped convolution"):
        weight_gradients(lw.open(grouped), torch.randn(2, 4, 6, 6))
    with pytest.raises(UserError, match="aside was not seen"):
        weight_gradients(lw.open(Aside()), torch.randn(2, 8))
