"""Runs on a model that is rewritten first: proven on its files, compared with the original."""

import json

import pytest
import torch
import yaml

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.plan import read_plan
from layerwise.core.reading.checkpoint import open_checkpoint, open_source
from layerwise.core.reading.structure import structure
from layerwise.core.rewriting.rewriting import Rewriting, rewrite
from layerwise.testing.outliers import with_outliers

QUICK = {"samples": 4, "text_samples": 4, "length": 32, "group": 32, "symmetric": True}


def test_a_turned_model_that_nothing_is_lost_of_is_the_original(llama, text, tmp_path):
    """Only what is rounded differs: 16-bit codes of a rotated model are the original."""
    done = lw.compress(
        llama, tmp_path / "out", bits=16, rotate="hadamard", calibration=text, **QUICK
    )
    assert done.proof is not None
    assert done.proof.largest_difference <= done.proof.allowed
    assert done.comparison is not None
    assert done.comparison.kl < 1e-6
    assert any("residual stream was turned by a random Hadamard" in note for note in done.notes)
    assert any("adds 0.0328 MB" in note for note in done.notes)
    assert done.bytes_before == open_checkpoint(llama).size
    written = open_checkpoint(tmp_path / "out")
    assert written.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in written.tensors
    seen = lw.evaluate(tmp_path / "out", against=llama, text=text, samples=4, length=32)
    assert seen.text is not None
    assert seen.text.kl is not None
    assert seen.text.kl < 1e-6


def test_the_comparison_is_with_the_model_before_it_was_turned(make_llama, text, tmp_path):
    """In bfloat16 the turned weights are rounded again: the comparison sees what that costs."""
    model = make_llama(tmp_path / "model", dtype=torch.bfloat16)
    options = {"bits": 16, "rotate": "orthogonal", "calibration": text, **QUICK}
    done = lw.compress(model, tmp_path / "out", **options)
    assert done.comparison is not None
    seen = lw.evaluate(tmp_path / "out", against=model, text=text, samples=64, length=32)
    assert done.comparison.kl > 1e-9
    assert seen.text is not None
    assert seen.text.kl is not None
    assert seen.text.kl == pytest.approx(done.comparison.kl, rel=0.5)


@pytest.mark.parametrize("format", ["dense", "layerwise", "compressed-tensors", "gptq", "gguf"])
def test_every_format_holds_a_turned_model(format, llama, text, tmp_path):
    group = {"group": 32, "symmetric": True} if format != "gguf" else {"group": None}
    done = lw.compress(
        llama,
        tmp_path / "out",
        bits=4,
        method="gptq",
        rotate="hadamard",
        calibration=text,
        format=format,
        **{**QUICK, **group},
    )
    assert done.proof is not None
    assert done.proof.largest_difference <= done.proof.allowed


@pytest.mark.parametrize("calibrated", [True, False])
def test_outliers_that_turning_spreads_cost_less(calibrated, tmp_path):
    model = with_outliers("builtin:tiny", tmp_path / "outliers", 30.0)
    options = {"bits": 3, "group": 0, "symmetric": True, "activation": "int8", "samples": 8}
    options |= {"text_samples": 8, "length": 64, "noise_floor": False, "text": "builtin"}
    options |= {"method": "gptq", "calibration": "builtin"} if calibrated else {}
    lost = {
        rotate: lw.compress(model, tmp_path / rotate, rotate=rotate, **options).comparison.kl
        for rotate in ("none", "hadamard")
    }
    assert lost["hadamard"] < 0.8 * lost["none"]


def test_a_plan_says_that_the_model_is_turned(llama, text, tmp_path):
    options = {"bits": 4, "rotate": "hadamard", "rotate_seed": 7, **QUICK}
    options.pop("text_samples")
    made = lw.plan(llama, calibration=text, **options)
    assert made.rewriting == Rewriting("hadamard", 7)
    shown = {"calibration": text, "samples": 4, "length": 32}
    first = lw.compress(llama, tmp_path / "first", plan=made, **shown)
    file = tmp_path / "first" / "plan.yaml"
    written = yaml.safe_load(file.read_text())
    assert (written["rotate"], written["rotate_seed"]) == ("hadamard", 7)
    assert read_plan(file, structure(open_checkpoint(llama))).rewriting == made.rewriting
    lw.compress(llama, tmp_path / "again", plan=file, **shown)
    names = open_checkpoint(tmp_path / "again").tensors
    one, other = (open_checkpoint(tmp_path / folder) for folder in ("first", "again"))
    assert all(torch.equal(one.read(name), other.read(name)) for name in names)
    assert any("seed 7" in note for note in first.notes)


@pytest.mark.parametrize(("entry", "value"), [("rotate", "sideways"), ("rotate_seed", "x")])
def test_a_plan_with_another_rotation_is_refused(entry, value, llama, tmp_path):
    lw.compress(llama, tmp_path / "out", bits=4, group=32, proof="none")
    file = tmp_path / "out" / "plan.yaml"
    edited = tmp_path / "plan.yaml"
    edited.write_text(f"{entry}: {value}\n{file.read_text()}")
    with pytest.raises(UserError, match=entry):
        read_plan(edited, structure(open_checkpoint(llama)))


def test_a_budget_and_a_sweep_on_a_turned_model(llama, text, tmp_path):
    options = {"calibration": text, "rotate": "hadamard", **QUICK}
    done = lw.compress(llama, tmp_path / "out", budget="3.5bits", method="gptq", **options)
    assert done.average_bits <= 3.5
    assert done.prediction is not None
    found = lw.sweep(llama, tmp_path / "swept", methods=["gptq"], budgets=["3.5"], **options)
    assert found.points[0].kl == pytest.approx(done.comparison.kl, rel=1e-3)
    plan = yaml.safe_load((tmp_path / "swept" / found.points[0].out).read_text())
    assert plan["rotate"] == "hadamard"


def test_another_rotation_does_not_take_up_a_stopped_run_or_its_candidates(llama, text, tmp_path):
    options = {"bits": 3, "method": "gptq", "inputs": "original", "calibration": text, **QUICK}
    outs = {
        seed: lw.compress(
            llama, tmp_path / f"{seed}", rotate="hadamard", rotate_seed=seed, **options
        )
        for seed in (0, 1)
    }
    assert outs[0].comparison.kl != outs[1].comparison.kl
    plain = lw.compress(llama, tmp_path / "plain", **options)
    assert plain.comparison.kl not in {one.comparison.kl for one in outs.values()}


def test_keys_are_scaled_before_the_rest(llama, text, tmp_path):
    done = lw.compress(llama, tmp_path / "out", bits=16, scale_keys=True, calibration=text, **QUICK)
    assert done.proof is not None
    assert done.comparison.kl < 1e-6
    assert any("keys were scaled" in note for note in done.notes)
    key = "model.layers.0.self_attn.k_proj.weight"
    before, after = open_checkpoint(llama), open_checkpoint(tmp_path / "out")
    assert (before.read(key) - after.read(key)).abs().max() > 0.01
    with pytest.raises(UserError, match=r"--scale-keys learns .* no text was given"):
        lw.compress(llama, tmp_path / "other", bits=4, group=32, scale_keys=True)


def test_the_command_line_turns_and_records_it(llama, text, tmp_path, capsys):
    from layerwise.cli.main import main

    out = tmp_path / "out"
    words = ["compress", llama, "-o", out, "--bits", 4, "--group", 32, "--rotate", "hadamard"]
    words += ["--rotate-seed", 3, "--calibration", text, "--text-samples", 4, "--length", 32]
    assert main([str(word) for word in words]) == 0
    capsys.readouterr()
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())["compress"]
    assert (recipe["rotate"], recipe["rotate_seed"]) == ("hadamard", 3)
    assert any("seed 3" in note for note in json.loads((out / "report.json").read_text())["notes"])


def test_what_cannot_be_turned_is_refused_before_work(make_llama, tmp_path):
    model = make_llama(tmp_path / "model", model_type="gpt_neox")
    with pytest.raises(UserError, match="--rotate cannot be used"):
        lw.compress(model, tmp_path / "out", bits=4, group=32, rotate="hadamard")
    assert not list(tmp_path.glob("out*"))


def test_a_source_that_nothing_is_asked_of_stays(llama):
    source = open_source(llama)
    assert rewrite(source, Rewriting()) is source
