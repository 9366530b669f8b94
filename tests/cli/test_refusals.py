"""What goes wrong is said in one message, and nothing is written."""

import fcntl
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

GPTQ = ("--bits", 4, "--group", 16, "--method", "gptq", "--length", 32, "--samples", 4)
RTN = ("--bits", 4, "--group", 16)
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def model(make_llama, tmp_path) -> Path:
    """A model directory to damage."""
    return make_llama(tmp_path / "model", shards=2)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def plan(layerwise, llama, tmp_path):
    """Writes the plan of the model, changed."""

    def write(change) -> Path:
        file = tmp_path / "plan.yaml"
        assert layerwise("plan", llama, "-o", file, *RTN).status == 0
        content = yaml.safe_load(file.read_text())
        change(content["layers"])
        file.write_text(yaml.safe_dump(content))
        return file

    return write


def shard(model: Path, number: int = 1) -> Path:
    return model / f"model-{number:05}-of-00002.safetensors"


# The model


def test_a_model_that_is_not_there(refuses, tmp_path, out):
    missing = tmp_path / "nowhere"
    refuses("compress", missing, "-o", out, *RTN, says=(missing,), remedy="Give a model directory")


def test_a_directory_without_safetensors(refuses, tmp_path, out):
    empty = tmp_path / "empty"
    empty.mkdir()
    says = (empty, "no .safetensors file")
    refuses("compress", empty, "-o", out, *RTN, says=says, remedy="save_pretrained")


@pytest.mark.parametrize("suffix", [".bin", ".pt"])
@pytest.mark.parametrize("inside", [True, False], ids=["directory", "file"])
def test_a_pickle(refuses, tmp_path, out, suffix, inside):
    folder = tmp_path / "model"
    folder.mkdir()
    pickle = folder / f"pytorch_model{suffix}"
    torch.save({"layer.weight": torch.ones(4, 4)}, pickle)
    given = folder if inside else pickle
    refuses("compress", given, "-o", out, *RTN, says=(pickle, "pickle"), remedy="python -c")


def test_the_command_for_a_pickle_converts_every_shard(refuses, layerwise, tmp_path, out):
    folder = tmp_path / "model"
    folder.mkdir()
    tied = torch.randn(32, 32)
    first, second = (folder / f"pytorch_model-{n}-of-2.bin" for n in (1, 2))
    torch.save({"a.weight": tied, "b.weight": tied}, first)
    torch.save({"c.weight": torch.randn(8, 32).T}, second)
    torch.save({"lr": 1}, folder / "training_args.bin")
    remedy = refuses("compress", folder, "-o", out, "--bits", 4, says=(first,), remedy="python")
    command = shlex.split(remedy.partition("convert it: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True)
    said = layerwise("compress", folder, "-o", out, "--bits", 4, "--group", 0)
    assert said.status == 0, said.err
    assert load_file(out / "model.safetensors").keys() == {"a.weight", "b.weight", "c.weight"}


def test_a_file_of_another_kind(refuses, tmp_path, out):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    refuses("inspect", file, says=(file, "not a safetensors file"), remedy="model directory")


@pytest.mark.parametrize("kept", [0, 5, 2000], ids=["all", "header", "data"])
def test_a_truncated_shard(refuses, model, out, kept):
    os.truncate(shard(model), kept)
    says = (shard(model), "damaged or cut short")
    refuses("compress", model, "-o", out, *RTN, says=says, remedy="copy that file again")


def test_an_index_that_names_a_missing_tensor(refuses, model, out):
    tensors = load_file(shard(model))
    name, _ = tensors.popitem()
    save_file(tensors, shard(model), {"format": "pt"})
    says = ("model.safetensors.index.json", shard(model).name, name)
    refuses("compress", model, "-o", out, *RTN, says=says, remedy="download both again")


def test_an_index_that_names_a_missing_file(refuses, model, out):
    shard(model, 2).unlink()
    says = ("model.safetensors.index.json", shard(model, 2).name)
    refuses("compress", model, "-o", out, *RTN, says=says, remedy="copy that shard again")


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": [1]}'])
def test_an_index_that_is_none(refuses, model, content):
    index = model / "model.safetensors.index.json"
    index.write_text(content)
    refuses("inspect", model, says=(index, "not a shard index"), remedy="Download it again")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_config_that_is_none(refuses, model, content):
    (model / "config.json").write_text(content)
    refuses("inspect", model, says=(model / "config.json",), remedy="Download it again")


def test_a_tensor_in_two_files(refuses, model):
    (model / "model.safetensors.index.json").unlink()
    name = next(iter(load_file(shard(model))))
    save_file({name: torch.ones(1)}, model / "zzz.safetensors")
    refuses("inspect", model, says=(shard(model), "zzz.safetensors", name), remedy="remove")


@pytest.mark.parametrize("proof", ["none", "logits"])
def test_nan_in_a_weight(refuses, model, out, proof):
    holder = next(s for s in (shard(model, n) for n in (1, 2)) if f"{DOWN}.weight" in load_file(s))
    tensors = load_file(holder)
    tensors[f"{DOWN}.weight"][3, 5] = float("nan")
    save_file(tensors, holder, {"format": "pt"})
    command = ("compress", model, "-o", out, *RTN, "--proof", proof)
    refuses(*command, says=(f"{DOWN}.weight", "NaN", "1 of"), remedy="use another one")


def test_a_model_that_is_quantized_already(refuses, make_llama, tmp_path, out):
    model = make_llama(tmp_path / "model", quantization_config={"quant_method": "gptq"})
    says = (model, "quantized already")
    refuses("compress", model, "-o", out, *RTN, says=says, remedy="original checkpoint")


def test_a_model_whose_code_is_remote(refuses, make_llama, tmp_path, text, out):
    remote = {"auto_map": {"AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}}
    settings = {"architectures": ["OddForCausalLM"], "model_type": "odd", **remote}
    model = make_llama(tmp_path / "model", **settings)
    (model / "modeling_odd.py").write_text(f"open({str(out)!r}, 'w').close()")
    command = ("compress", model, "-o", out, *GPTQ, "--calibration", text)
    says = (model, "OddForCausalLM", "remote")
    refuses(*command, says=says, remedy="--trust-remote-code")
    refuses("evaluate", model, "--text", text, says=says, remedy="--trust-remote-code")


# The wish


def test_an_unknown_method(refuses, llama, out):
    command = ("compress", llama, "-o", out, "--bits", 4, "--method", "gptk")
    refuses(*command, says=("quantize/gptk",), remedy="quantize/gptq")


def test_a_group_that_does_not_divide(refuses, llama, out):
    command = ("compress", llama, "-o", out, "--bits", 4, "--group", 24)
    refuses(*command, says=("model.layers.0.mlp.down_proj", "24", "64"), remedy="16, 32, 64")


def test_nothing_asked_for(refuses, llama, out):
    refuses("compress", llama, "-o", out, says=("nothing was asked for",), remedy="--bits 4")


def test_a_budget_below_what_the_levels_allow(refuses, llama, out):
    command = ("compress", llama, "-o", out, "--budget", "1.5bits", "--group", 16)
    refuses(*command, says=("budget",), remedy="")


@pytest.mark.parametrize("budget", ["much", "3.5", "-1bits", "3.5 furlongs"])
def test_an_unreadable_budget(refuses, llama, out, budget):
    command = ("compress", llama, "-o", out, f"--budget={budget}", "--group", 16)
    refuses(*command, says=(budget, "not a budget"), remedy="3.5bits")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--bits", "many"), "--bits"),
        (("--bits", "0"), "bits 0"),
        (("--bits", "17"), "bits 17"),
        (("--bits", "4", "--density", "1.5"), "density 1.5"),
        (("--rank", "-1"), "rank -1"),
        (("--bits", "4", "--bit", "4"), "--bit"),
        (("--bits", "4", "--group", "-1"), "group -1"),
        (("--budget", "3bits", "--allow", "bits=two"), "--allow bits=two"),
        (("--bits", "4", "--budget", "3bits"), "--budget"),
        (("--bits", "4", "--format", "zip"), "unknown format"),
        (("--bits", "4", "--server", "apache"), "unknown server"),
        (("--bits", "3", "--server", "vllm"), "vllm does not load 3 bits"),
        (("--bits", "4", "--method", "fp8"), "bits 4"),
        (
            ("--bits", "4", "--samples", "0", "--proof", "logits", "--text-samples", "0"),
            "0 windows",
        ),
        (("--bits", "4", "--group", "0", "--proof", "logits", "--length", "1"), "1 tokens"),
        (("--bits", "4", "--group", "0", "--proof", "logits", "--length", "999"), "999"),
    ],
)
def test_a_number_that_is_not_possible(refuses, llama, out, words, says):
    refuses("compress", llama, "-o", out, *words, says=(says,), remedy="")


@pytest.mark.parametrize("words", [(), ("compress",), ("fold", "x"), ("inspect", "a", "b")])
def test_a_command_line_that_is_none(layerwise, words):
    said = layerwise(*words)
    assert said.status == 2
    assert "layerwise" in said.err
    assert not said.out


# The plan


def test_a_plan_that_is_not_there(refuses, llama, out, tmp_path):
    file = tmp_path / "none.yaml"
    command = ("compress", llama, "-o", out, "--plan", file)
    refuses(*command, says=(file,), remedy="layerwise plan")


def test_an_unknown_layer_in_a_plan(refuses, llama, out, plan):
    file = plan(lambda layers: layers.update({"model.layers.9.mlp.down_proj": {"bits": 4}}))
    command = ("compress", llama, "-o", out, "--plan", file)
    refuses(*command, says=(file, "model.layers.9.mlp.down_proj"), remedy="layerwise inspect")


def test_a_layer_left_out_of_a_plan(refuses, llama, out, plan):
    file = plan(lambda layers: layers.pop(DOWN))
    command = ("compress", llama, "-o", out, "--plan", file)
    refuses(*command, says=(file, DOWN), remedy=f"`{DOWN}: {{}}`")


def test_two_patterns_that_claim_one_layer(refuses, llama, out, plan):
    def change(layers):
        del layers[DOWN]
        layers.update({"*.down_proj": {"bits": 2}, "model.layers.1.mlp.*": {"bits": 3}})

    command = ("compress", llama, "-o", out, "--plan", plan(change))
    says = ("*.down_proj", "model.layers.1.mlp.*", DOWN)
    refuses(*command, says=says, remedy=f"Add a line for {DOWN}")


def test_an_unknown_field_in_a_plan(refuses, llama, out, plan):
    file = plan(lambda layers: layers[DOWN].update(width=3))
    command = ("compress", llama, "-o", out, "--plan", file)
    refuses(*command, says=(file, DOWN, "width"), remedy="bits, group")


def test_an_unknown_method_in_a_plan(refuses, llama, out, plan):
    file = plan(lambda layers: layers[DOWN].update(method="gptk"))
    command = ("compress", llama, "-o", out, "--plan", file)
    refuses(*command, says=("quantize/gptk",), remedy="quantize/gptq")


@pytest.mark.parametrize(
    "flag", ["--bits=3", "--group=32", "--symmetric", "--gptq-damping=1 --method=gptq"]
)
def test_a_wish_beside_a_plan(refuses, llama, out, plan, flag):
    file = plan(lambda _: None)
    command = ("compress", llama, "-o", out, "--plan", file, *flag.split())
    refuses(*command, says=(flag.split()[0],), remedy="Leave one out")


# Texts


@pytest.mark.parametrize("command", ["compress", "plan"])
def test_no_calibration_text(refuses, llama, out, command):
    says = ("quantize/gptq", llama)
    refuses(command, llama, "-o", out, *GPTQ, says=says, remedy="--calibration TEXT")


def test_no_calibration_text_for_a_measure(refuses, llama):
    command = ("inspect", llama, "--measure", "lim")
    refuses(*command, says=("measure/lim",), remedy="--calibration TEXT")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "there is no text"),
        ("empty.txt", b"", "0 tokens"),
        ("short.txt", b"too short for a window", "22 tokens"),
        ("latin.txt", "é".encode("latin-1"), "cannot be read"),
        ("list.json", b"[", "cannot be read"),
        ("list.json", b'{"a": 1}', "not a JSON list"),
        ("", None, "cannot be read"),
    ],
)
def test_a_calibration_text(refuses, llama, tmp_path, out, name, content, says):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    command = ("compress", llama, "-o", out, *GPTQ, "--calibration", file)
    refuses(*command, says=(says, file), remedy="Give" if content != b'{"a": 1}' else "Write")


# The output


def test_an_output_that_exists(refuses, llama, out):
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    says = (out, "exists")
    refuses("compress", llama, "-o", out, *RTN, says=says, remedy="Choose another -o")
    refuses("plan", llama, "-o", out, *RTN, says=says, remedy="Choose another -o")


@pytest.mark.parametrize("name", ["file/out", "out"])
def test_an_output_that_cannot_be_made(refuses, llama, tmp_path, name):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "out.partial").write_text("mine")
    command = ("compress", llama, "-o", tmp_path / name, *RTN, "--proof", "none")
    refuses(*command, says=(tmp_path / f"{name}.partial",), remedy="Choose another -o")


@pytest.mark.parametrize("restart", [[], ["--restart"]])
def test_files_of_others_where_the_output_would_be_made(refuses, llama, out, restart):
    partial = Path(f"{out}.partial")
    partial.mkdir()
    (partial / "precious.txt").write_text("mine")
    command = ("compress", llama, "-o", out, *RTN, "--proof", "none", *restart)
    refuses(*command, says=(partial, "no run put there"), remedy="move them away")


def test_another_run_that_stopped(layerwise, refuses, llama, out):
    partial = Path(f"{out}.partial")
    partial.mkdir()
    (partial / "lock").touch()
    (partial / "journal.jsonl").write_text(json.dumps({"identity": "other"}) + "\n")
    command = ("compress", llama, "-o", out, *RTN, "--proof", "none")
    refuses(*command, says=(partial, "other"), remedy="--restart")
    assert layerwise(*command, "--restart").status == 0
    assert out.exists()
    assert not partial.exists()


def test_two_runs_at_once(refuses, llama, out):
    partial = Path(f"{out}.partial")
    partial.mkdir()
    with (partial / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = ("compress", llama, "-o", out, *RTN, "--proof", "none")
        refuses(*command, says=(out, "another run"), remedy="Wait for it")
        refuses(*command, "--restart", says=(out, "another run"), remedy="Wait for it")


# Recipes


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no recipe"),
        ("", "not a recipe"),
        ("- compress", "not a recipe"),
        ("compress:", "compress is not a step"),
        ("shrink: {model: x}", "shrink is not a step"),
        ("compress: {model: x}", "lacks `out`"),
        ("compress: {model: x, out: y, size: 3}", "size"),
        ("compress: {model: [", "not YAML"),
    ],
)
def test_a_recipe(refuses, tmp_path, content, says):
    file = tmp_path / "recipe.yaml"
    if content is not None:
        file.write_text(content)
    refuses("run", file, says=(file, says), remedy="")


# Recipes


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ({"budget": 3.5}, "budget: 3.5"),
        ({"bits": 4, "proof": "maybe"}, "proof: 'maybe'"),
        ({"bits": 4, "symmetric": "no"}, "symmetric: 'no'"),
        ({"bits": 4, "trust_remote_code": "maybe"}, "trust_remote_code: 'maybe'"),
        ({"bits": 4, "allow": 4}, "allow: 4"),
        ({"bits": 4, "group": "32"}, "group: '32'"),
        ({"bits": 4, "options": [1]}, "options: [1]"),
        ({"bits": 4, "device": "gpu"}, "no device 'gpu'"),
        ({"bits": 4, "speed": 1}, "no arguments ['speed']"),
        ({"bits": 4, "budget": "3bits"}, "at once"),
        ({"out": 7}, "out: 7"),
    ],
)
def test_a_recipe_that_is_not_written_as_it_must_be(refuses, llama, out, tmp_path, lines, says):
    file = tmp_path / "recipe.yaml"
    step = {"model": str(llama), "out": str(out), **lines}
    file.write_text(yaml.safe_dump({"compress": step}))
    refuses("run", file, says=(says,), remedy="")


def test_a_recipe_with_a_step_twice(refuses, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("compress: {}\ncompress: {}\n")
    refuses("run", file, says=("compress stands there twice",), remedy="")


# Checkpoints that transformers would fill up, or that answer nothing


def test_a_missing_weight_is_not_filled_with_noise(refuses, make_llama, text, tmp_path):
    model = make_llama(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    windows = ("--length", 32, "--samples", 4)
    refuses("evaluate", model, "--text", text, *windows, says=("model.norm.weight",), remedy="")


def test_nan_outside_the_layers(refuses, make_llama, tmp_path, out):
    model = make_llama(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    says = ("model.norm.weight", "NaN")
    refuses("compress", model, "-o", out, *RTN, "--proof", "none", says=says, remedy="")


def test_weights_of_another_shape_than_the_configuration_says(
    refuses, make_llama, text, tmp_path, out
):
    model = make_llama(tmp_path / "model", intermediate_size=48)
    command = ("compress", model, "-o", out, *GPTQ, "--calibration", text)
    refuses(*command, says=("config.json makes it",), remedy="")


@pytest.mark.parametrize("wish", [("--bits", 1, "--symmetric"), ("--density", "1e-9")])
def test_what_would_leave_nothing(refuses, llama, out, wish):
    refuses("compress", llama, "-o", out, *wish, says=("not possible",), remedy="")


def test_a_model_that_is_no_language_model(layerwise, refuses, make_llama, tmp_path, out):
    model = make_llama(tmp_path / "model", architectures=["LlamaModel"])
    command = ("compress", model, "-o", out, *RTN)
    refuses(*command, "--proof", "logits", says=("LlamaModel", "logits"), remedy="--proof none")
    assert layerwise(*command).status == 0
