"""What every command prints, and where."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from cli.conftest import contents
from safetensors.torch import load_file

COMMANDS = (
    "inspect",
    "plan",
    "compress",
    "evaluate",
    "run",
    "report",
    "methods",
    "show",
    "check",
    "claims",
)
WINDOWS = ("--length", 32, "--samples", 4)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_examples(layerwise, command):
    said = layerwise(*command.split(), "--help")
    assert said.status == 0
    examples = said.out.partition("examples:\n")[2]
    assert f"  layerwise {command}".rstrip() in examples


def test_help_names_every_command(layerwise):
    said = layerwise("--help")
    assert all(f"    {command} " in said.out for command in COMMANDS)


def test_help_of_a_method_shows_its_options(layerwise):
    said = layerwise("compress", "--method", "gptq", "--help")
    assert "options of quantize/gptq" in said.out
    assert "--gptq-damping" in said.out


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from layerwise.cli import main; status = main(['--help']); "
        "sys.exit(status or 'torch' in sys.modules or 'numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_version(layerwise):
    import layerwise as lw

    assert layerwise("--version").out == lw.__version__ + "\n"


# --json


def test_inspect(layerwise, llama):
    said = layerwise("inspect", llama, "--measure", "weight_error", "--group", 16, "--json")
    assert said.status == 0
    assert "model.layers.1.mlp.down_proj" in json.dumps(said.document)
    assert "model.layers.1.mlp.down_proj" in said.err


def test_inspect_shows_the_error_at_each_width(layerwise, llama, text):
    command = ("inspect", llama, "--measure", "lim,error", "--group", 16, "--calibration", text)
    one = layerwise(*command, *WINDOWS, "--json").document["layers"]
    several = layerwise(*command, *WINDOWS, "--bits", "2,4,8", "--json").document["layers"]
    for before, after in zip(one, several, strict=True):
        assert after["error_4"] == pytest.approx(before["error"], rel=1e-4)
        assert after["error_2"] > after["error_4"] > after["error_8"] > 0
        assert after["lim"] == before["lim"]


def test_inspect_compares_measures_with_what_each_layer_brings(layerwise, llama, text, tmp_path):
    picture = tmp_path / "new" / "layers.svg"
    wish = ("--density", 0.5, "--pruner", "wanda", "--calibration", text, "--text-samples", 2)
    command = ("inspect", llama, "--measure", "all", "--truth", *wish, *WINDOWS, "-o", picture)
    said = layerwise(*command, "--json")
    assert said.status == 0
    assert all(layer["truth"] > 0 and "lim" in layer for layer in said.document["layers"])
    assert said.document["truth"]["done"] == "density 0.5 by wanda"
    assert said.document["agreement"]["lim"]["truth"] is not None
    assert said.document["left_out"]["filters"]
    assert any(line.startswith("matters most: model.") for line in said.document["answers"])
    assert "foretells the truth best" in said.err
    assert "…" not in said.err
    assert picture.read_text().startswith("<svg xmlns")
    assert contents(tmp_path).keys() == {"new/layers.svg"}
    again = layerwise(*command)
    assert again.status == 2
    assert "exists already" in again.err


def test_inspect_takes_the_options_of_measures(layerwise, llama):
    command = ("inspect", llama, "--measure", "effective_rank", "--json")
    plain = layerwise(*command).document["layers"]
    counted = layerwise(*command, "--effective_rank-order", 0.0).document["layers"]
    for before, after in zip(plain, counted, strict=True):
        assert after["effective_rank"] > before["effective_rank"]


def test_plan(layerwise, llama, tmp_path):
    file = tmp_path / "new" / "plan.yaml"
    command = ("plan", llama, "-o", file, "--budget", "4bits", "--group", 16)
    said = layerwise(*command, "--json")
    assert said.status == 0
    assert said.document["plan"] == str(file)
    written = yaml.safe_load(file.read_text())
    assert written["layers"].keys() == said.document["layers"].keys()
    assert written["leave"] == said.document["left"]
    assert "model.layers.1.mlp.down_proj" in said.err
    assert contents(tmp_path).keys() == {"new/plan.yaml"}
    layers = said.document["layers"].values()
    assert said.document["forecast"]["size_bytes"] > sum(map(bool, layers))
    assert "forecast: about" in said.err


def test_compress_evaluate_and_run(layerwise, llama, text, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    wish = ("--bits", 4, "--method", "gptq", "--group", 16, "--gptq-damping", 0.1)
    texts = ("--calibration", text, "--text-samples", 4)
    said = layerwise("compress", llama, "-o", out, *wish, *WINDOWS, *texts, "--json")
    assert said.status == 0, said.err
    assert said.document == json.loads((out / "report.json").read_text())
    assert said.document["proof"]["largest_difference"] <= said.document["proof"]["allowed"]
    assert len(said.document["layers"]) == 14
    assert "proven" in said.err

    assert torch.is_grad_enabled()

    said = layerwise("evaluate", out, "--against", llama, "--text", text, *WINDOWS, "--json")
    assert said.status == 0, said.err
    assert said.document["text"]["kl"] > 0
    assert said.document["text"]["kl_error"] > 0
    assert said.document["noise_floor"]["kl"] > 0
    assert " ± " in said.err
    assert "read 4 windows of 32 tokens, 124 of them predicted" in said.err
    assert torch.is_grad_enabled()
    assert "perplexity" in said.err

    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    recipe["compress"]["out"] = str(again)
    recipe["evaluate"] = {"model": str(again), "samples": 4, "length": 32}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    said = layerwise("run", file, "--json")
    assert said.status == 0, said.err
    compressed, evaluated = said.document
    assert compressed["out"] == str(again)
    assert evaluated["text"]["perplexity"] > 1
    assert "proven" in said.err
    for name in ("model.safetensors", "config.json", "plan.yaml", "generation_config.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_a_recipe_of_a_plan(layerwise, llama, tmp_path):
    plan, out, again = (tmp_path / name for name in ("plan.yaml", "out", "again"))
    wish = ("--budget", "4.5bits", "--group", 16, "--density", 0.5)
    assert layerwise("plan", llama, "-o", plan, *wish).status == 0
    command = ("compress", llama, "--plan", plan, "--proof", "none")
    assert layerwise(*command, "-o", out).status == 0
    recipe = (out / "recipe.yaml").read_text().replace(f"out: {out}", f"out: {again}")
    (tmp_path / "recipe.yaml").write_text(recipe)
    said = layerwise("run", tmp_path / "recipe.yaml", "--json")
    assert said.status == 0, said.err
    assert said.document[0]["out"] == str(again)
    names = ("model.safetensors", "plan.yaml")
    assert all((again / n).read_bytes() == (out / n).read_bytes() for n in names)


def test_a_file_that_no_loader_finds_is_not_evaluated(refuses, llama, text, tmp_path):
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((llama / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    says = (alone, "cannot be loaded as a model")
    refuses("evaluate", alone, "--text", text, *WINDOWS, says=says, remedy="model's directory")


def test_the_weights_of_a_directory_stand_for_it(layerwise, llama, text):
    models = (llama / "model.safetensors", llama)
    file, folder = (layerwise("evaluate", m, "--text", text, *WINDOWS, "--json") for m in models)
    assert file.document["text"] == folder.document["text"]


def test_a_group_that_fits_is_found(layerwise, llama, tmp_path):
    """Layers are 32 and 64 wide."""
    said = layerwise("plan", llama, "--bits", 4, "-o", tmp_path / "plan.yaml", "--json")
    assert {layer["group"] for layer in said.document["layers"].values()} == {32}


def test_a_recipe_is_run_again_elsewhere(layerwise, llama, tmp_path):
    wish = ("--bits", 4, "--group", 16, "--proof", "none")
    assert layerwise("compress", llama, "-o", tmp_path / "out", *wish).status == 0
    said = layerwise("run", tmp_path / "out" / "recipe.yaml", "-o", tmp_path / "again", "--json")
    assert said.status == 0, said.err
    files = [tmp_path / name / "model.safetensors" for name in ("out", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_output_that_nobody_reads_stops_no_work(llama, tmp_path):
    script = Path(sys.executable).with_name("layerwise")
    out = tmp_path / "out"
    wish = f"--bits 4 --group 16 --proof none -o {out}"
    command = f"set -o pipefail; {script} compress {llama} {wish} 2>&1 >/dev/null | head -c 1"
    subprocess.run(["bash", "-c", command], check=True, capture_output=True)
    assert (out / "report.json").exists()


def test_methods(layerwise):
    said = layerwise("methods", "--json")
    assert said.status == 0
    assert {"quantize/rtn", "prune/wanda"} <= {method["id"] for method in said.document}
    few = layerwise("methods", "quantize", "--needs", "nothing", "--json").document
    assert "quantize/rtn" in {method["id"] for method in few}
    assert all(m["needs"] == "nothing" and m["id"].startswith("quantize/") for m in few)


def test_show(layerwise):
    said = layerwise("show", "quantize/gptq", "--json")
    assert said.status == 0
    assert said.document["id"] == "quantize/gptq"
    assert "damping" in said.document["page"]
    assert layerwise("show", "quantize/gptq").out.strip() == said.document["page"].strip()


def test_check(layerwise):
    said = layerwise("check", "allocate/uniform", "--json")
    assert said.status == 0
    assert set(said.document.values()) == {"ok"}
    assert all(law in said.err for law in said.document)


@pytest.mark.parametrize(
    "words", [("methods", "shrink"), ("show", "quantize/none"), ("check", "x/y")]
)
def test_a_method_that_is_not_there(refuses, words):
    refuses(*words, says=(words[1].partition("/")[0],), remedy="")


def test_json_of_a_command_line_that_is_none(layerwise):
    said = layerwise("inspect", "--json")
    assert said.status == 2
    assert "MODEL" in said.document["error"]
    assert "layerwise inspect --help" in said.document["remedy"]


def test_the_installed_command(llama, tmp_path):
    """The console script, with nothing in this process: the one slow start of these tests."""
    script = Path(sys.executable).with_name("layerwise")
    out = tmp_path / "out"
    command = [script, "compress", llama, "-o", out, "--bits", "4", "--group", "16"]
    done = subprocess.run(
        [*command, "--proof", "none", "--json"], check=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout)["out"] == str(out)
    assert load_file(out / "model.safetensors")
