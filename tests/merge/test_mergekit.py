"""Recipes of mergekit's, run unchanged."""

import pytest
import torch
from relatives import relatives, weights_of

import layerwise as lw


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, make_llama):
    folder = tmp_path_factory.mktemp("recipes")
    return relatives(folder, make_llama(folder / "start", blocks=4), 2)


def carried_out(tmp_path, recipe, name="out"):
    file = tmp_path / f"{name}.yml"
    file.write_text(recipe)
    lw.merge([file], tmp_path / name)
    return weights_of(tmp_path / name)


def test_a_linear_recipe(tuned, tmp_path):
    found = carried_out(
        tmp_path,
        f"""
models:
  - model: {tuned[1]}
    parameters: {{weight: 0.3}}
  - model: {tuned[2]}
    parameters: {{weight: 0.5}}
merge_method: linear
dtype: bfloat16
""",
    )
    first, second = weights_of(tuned[1]), weights_of(tuned[2])
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        expected = (0.3 * first[name] + 0.5 * second[name]) / 0.8
        torch.testing.assert_close(tensor.float(), expected, rtol=1e-2, atol=1e-2)


def test_gradients_and_filters(tuned, tmp_path):
    found = carried_out(
        tmp_path,
        f"""
slices:
  - sources:
      - {{model: {tuned[1]}, layer_range: [0, 4]}}
      - {{model: {tuned[2]}, layer_range: [0, 4]}}
merge_method: slerp
base_model: {tuned[1]}
parameters:
  t:
    - filter: self_attn
      value: [0, 1]
    - filter: mlp
      value: 1
    - value: 0
""",
    )
    first, second = weights_of(tuned[1]), weights_of(tuned[2])
    begin, end = "model.layers.0.self_attn.q_proj.weight", "model.layers.3.self_attn.q_proj.weight"
    assert torch.equal(found[begin], first[begin])
    assert torch.equal(found[end], second[end])
    assert torch.equal(found["model.norm.weight"], first["model.norm.weight"])
    between = "model.layers.1.self_attn.q_proj.weight"
    a, b = first[between].double(), second[between].double()
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    arc = ((2 / 3) * angle).sin() * a + ((1 / 3) * angle).sin() * b
    torch.testing.assert_close(found[between].double(), arc / angle.sin(), rtol=1e-4, atol=1e-5)
    mlp = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(found[mlp], second[mlp])


def test_ties_is_cut_in_each_tensor(tuned, tmp_path):
    found = carried_out(
        tmp_path,
        f"""
models:
  - model: {tuned[0]}
  - model: {tuned[1]}
    parameters: {{density: 0.5, weight: 0.6}}
  - model: {tuned[2]}
    parameters: {{density: 0.25, weight: 0.4}}
merge_method: ties
base_model: {tuned[0]}
parameters: {{normalize: true, int8_mask: true, lambda: 0.9}}
dtype: float32
""",
    )
    base, *others = (weights_of(one) for one in tuned)
    for name in ("model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"):
        total = torch.zeros_like(base[name]).double()
        trimmed = []
        for state, density, weight in zip(others, (0.5, 0.25), (0.6, 0.4), strict=True):
            difference = (state[name] - base[name]).double()
            kept = round(density * difference.numel())
            cut = difference.abs().flatten().sort(descending=True).values[kept - 1]
            trimmed.append(weight * difference * (difference.abs() >= cut))
        sign = torch.where(sum(trimmed) >= 0, 1.0, -1.0)
        count = torch.zeros_like(total)
        for one, weight in zip(trimmed, (0.6, 0.4), strict=True):
            agrees = one * sign > 0
            total += one * agrees
            count += weight * agrees
        expected = base[name] + 0.9 * total / count.where(count > 0, 1.0)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-5)


def test_layers_of_two_models_are_stacked(tuned, tmp_path):
    found = carried_out(
        tmp_path,
        f"""
slices:
  - sources: [{{model: {tuned[1]}, layer_range: [0, 3]}}]
  - sources: [{{model: {tuned[2]}, layer_range: [1, 4]}}]
merge_method: passthrough
""",
    )
    first, second = weights_of(tuned[1]), weights_of(tuned[2])
    name = "model.layers.{}.mlp.down_proj.weight"
    assert torch.equal(found[name.format(2)], first[name.format(2)])
    assert torch.equal(found[name.format(3)], second[name.format(1)])
    assert torch.equal(found[name.format(5)], second[name.format(3)])
    assert torch.equal(found["model.embed_tokens.weight"], first["model.embed_tokens.weight"])
    assert torch.equal(found["model.norm.weight"], second["model.norm.weight"])
    model = lw.load(tmp_path / "out")
    assert model.config.num_hidden_layers == 6
    assert model(torch.arange(9)[None]).logits.shape == (1, 9, 256)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("merge_method: della", "merge_method della is not understood"),
        ("merge_method: linear\nchat_template: auto", "chat_template is not understood"),
        ("merge_method: linear\nparameters: {gamma: 1}", "gamma in parameters is not understood"),
        ("merge_method: linear\ntokenizer_source: union", "tokenizer_source union is not"),
        ("merge_method: linear\ndtype: float64", "dtype float64 is not understood"),
        ("merge_method: ties", "ties lacks base_model"),
        ("merge_method: linear\nslices: []", "lacks a weight"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(change, said, tuned, tmp_path):
    recipe = f"models: [{{model: {tuned[1]}}}, {{model: {tuned[2]}}}]\n{change}\n"
    with pytest.raises(lw.UserError, match=said):
        carried_out(tmp_path, recipe)
    assert not (tmp_path / "out").exists()
