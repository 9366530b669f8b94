"""What an inspection finds out, against the definition written slowly."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.telling.inspection import TRUTH, Inspection, Truth
from layerwise.flow.agreeing import agreement, rank_correlation
from layerwise.prune.wanda import wanda
from layerwise.quantize.rtn import rtn
from layerwise.report.answers import answers, mean_ranks, ranks

TEXT = torch.arange(12 * 32).remainder(251).reshape(12, 32)
SHOWN = {"calibration": TEXT[:8], "samples": 8, "length": 32, "cache": False}
HELD = {"text": TEXT[8:], "text_samples": 4}


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def divergence(model, layer, weight, ids):
    """KL of a model with one weight replaced, the whole model run twice."""
    linear = model.get_submodule(layer)
    kept = linear.weight.data
    with torch.no_grad():
        before = model(ids).logits[:, :-1].log_softmax(dim=-1)
        linear.weight.data = weight
        after = model(ids).logits[:, :-1].log_softmax(dim=-1)
        linear.weight.data = kept
    return float((before.exp() * (before - after)).sum(dim=-1).mean())


def test_the_truth_is_the_kl_of_the_whole_model_with_one_layer_rounded(llama):
    found = lw.inspect(llama, [], truth=True, levels=[3], group=16, **SHOWN, **HELD)
    model = loaded(llama)
    assert found.truth is not None
    assert found.truth.done == "3 bits by rtn, groups of 16"
    for layer, kl in found.truth.kl.items():
        weight = model.get_submodule(layer).weight.data
        rounded = rtn(weight, bits=3, group=16, symmetric=False).dequantize()
        assert kl == pytest.approx(divergence(model, layer, rounded, TEXT[8:]), rel=1e-3)


def test_the_truth_of_a_calibrated_pruner_is_that_of_what_it_makes_here(llama):
    wish = {"density": 0.5, "pruner": "wanda"}
    found = lw.inspect(llama, "owl", truth=True, **wish, **SHOWN, **HELD)
    assert found.truth is not None
    assert found.truth.done == "density 0.5 by wanda"
    model = loaded(llama)
    layer = "model.layers.1.mlp.down_proj"
    seen = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, given: seen.append(given))
    with torch.no_grad():
        model(TEXT[:8])
    hook.remove()
    inputs = seen[0][0].flatten(0, 1)
    gram = inputs.T @ inputs / len(inputs)
    weight = wanda(model.get_submodule(layer).weight.data, gram, density=0.5).weight
    kl = divergence(model, layer, weight, TEXT[8:])
    assert found.truth.kl[layer] == pytest.approx(kl, rel=1e-3)


def test_all_measures_are_those_that_the_texts_allow(llama):
    bare = lw.inspect(llama, cache=False)
    assert {"alpha", "zd", "effective_rank"} <= bare.scores.keys()
    assert "calibration" in bare.left_out["lim"]
    assert "calibration" in bare.left_out["ecoflap"]
    full = lw.inspect(llama, **SHOWN)
    assert {"lim", "nuclear_norm", "ecoflap", "dlp"} <= full.scores.keys()
    # A model without convolutions has no filters to tell apart.
    assert full.left_out["filter_sparsity"] == "it says 0 of every layer"
    assert not full.scores.keys() & full.left_out.keys()
    assert full.agreement.keys() == full.scores.keys()


def test_all_measures_of_a_module_are_those_of_its_weights():
    module = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5))
    pictures = torch.randn(40, 12)
    found = lw.inspect(module, truth=True, calibration=pictures, cache=False)
    assert "as a whole" in found.left_out["lim"]
    assert found.truth is not None
    first = module[0].weight.data
    rounded = rtn(first, bits=4, group=12, symmetric=False).dequantize()
    with torch.no_grad():
        before = module(pictures).log_softmax(dim=-1)
        hidden = functional.linear(pictures, rounded, module[0].bias).relu()
        after = module[2](hidden).log_softmax(dim=-1)
    kl = float((before.exp() * (before - after)).sum(dim=-1).mean())
    assert found.truth.kl["0"] == pytest.approx(kl, rel=1e-3)


def test_a_measure_that_is_named_is_never_left_out(llama):
    with pytest.raises(UserError, match="calibration"):
        lw.inspect(llama, ["alpha", "lim"], cache=False)


def test_errors_at_several_widths_are_columns_of_their_own(llama):
    found = lw.inspect(llama, "error", levels=[2, 8], group=16, **SHOWN)
    assert list(found.scores) == ["error_2", "error_8"]
    pairs = zip(found.scores["error_2"].values(), found.scores["error_8"].values(), strict=True)
    assert all(coarse > fine > 0 for coarse, fine in pairs)


def test_rank_correlation_is_the_linear_one_of_ranks():
    first, second = torch.randn(9).tolist(), torch.randn(9).tolist()
    places = [[sorted(side).index(v) for v in side] for side in (first, second)]
    expected = float(torch.corrcoef(torch.tensor(places).float())[0, 1])
    assert rank_correlation(first, second) == pytest.approx(expected, abs=1e-6)
    assert rank_correlation(first, [-v for v in first]) == pytest.approx(-1)
    assert rank_correlation(first, [1.0] * 9) is None
    assert rank_correlation(first, [float("nan"), *first[1:]]) is None


def test_agreement_is_symmetric():
    columns = {name: dict(zip("abcde", torch.randn(5).tolist(), strict=True)) for name in "xyz"}
    found = agreement(columns)
    for one, other in itertools.product(columns, repeat=2):
        assert found[one][other] == found[other][one]
    assert all(found[name][name] == pytest.approx(1) for name in columns)


# Answers in words


def inspected(kl, scores):
    columns = {**scores, TRUTH: kl}
    return Inspection(
        "m", scores, truth=Truth(kl, "small", "a text", 4), agreement=agreement(columns)
    )


def test_answers_name_what_matters_and_what_can_go():
    kl = {"a": 1.0, "b": 0.02, "c": 2.0, "d": 0.01, "e": 0.5}
    says = {name: -value for name, value in kl.items()}
    told = "\n".join(answers(inspected(kl, {"good": dict(kl), "bad": says})))
    assert "matters most: c (2.00, 57% of the sum), a (1.00, 28% of the sum), e" in told
    assert "can go: d, b; 2 layers of 5 that bring 0.85% of the sum" in told
    assert "foretells the truth best, by rank correlation over layers: good (1.00)" in told
    assert "ranks layers against the truth: bad (-1.00)" in told
    assert "rank them the other way round: good and bad (-1.00)" in told


def test_answers_do_not_let_go_of_what_is_dear():
    told = "\n".join(answers(inspected({"a": 1.0, "b": 1.1}, {})))
    assert "none can go at little cost: the cheapest, a, brings 48% of the sum" in told


def test_answers_without_a_truth_go_by_ranks():
    scores = {"x": {"a": 3.0, "b": 2.0, "c": 1.0}, "y": {"a": 2.0, "b": 3.0, "c": 1.0}}
    told = answers(
        Inspection("m", scores, left_out={"lim": "no text"}, agreement=agreement(scores))
    )
    assert told[0].startswith("matters most by the mean of their ranks under 2 measures: ")
    assert told[1].startswith("matters least: c, ")
    assert told[-1] == "left out: lim: no text"


def test_ranks_share_places():
    assert ranks({"a": 5.0, "b": 7.0, "c": 5.0, "d": 1.0}) == {"a": 2.5, "b": 1, "c": 2.5, "d": 4}
    assert mean_ranks({"x": {"a": 2.0, "b": 1.0}, "y": {"a": 1.0, "b": 1.0}}) == {
        "a": 1.25,
        "b": 1.75,
    }
