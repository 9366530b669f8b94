"""Models that lose units or blocks: proven on their files, compared with the original."""

import json

import pytest
import torch
import transformers

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.progress import Silent
from layerwise.core.reading.checkpoint import open_checkpoint

QUICK = {"samples": 4, "text_samples": 4, "length": 32, "noise_floor": False, "cache": False}
FLAP = {"narrow": "flap", "keep": 0.7, **QUICK}


@pytest.fixture(scope="module")
def deep(make_llama, tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("deep") / "model", blocks=3)


def contents(folder):
    told = {"report.json", "report.html", "recipe.yaml"}
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name not in told}


def test_a_narrow_model_is_smaller_and_loads_anywhere(deep, text, tmp_path):
    done = lw.compress(deep, tmp_path / "out", calibration=text, **FLAP)
    assert done.proof is not None
    assert done.proof.loader.startswith("transformers")
    assert done.comparison is not None
    assert done.comparison.kl > 0.001
    assert done.bytes_before == open_checkpoint(deep).size
    # Embeddings and norms stay; biases are added.
    source, written = open_checkpoint(deep), open_checkpoint(tmp_path / "out")
    layers = [
        sum(i.count for i in s.tensors.values() if "_proj.weight" in i.name)
        for s in (source, written)
    ]
    assert 0.6 * layers[0] < layers[1] <= 0.7 * layers[0]
    assert done.bytes_after < done.bytes_before
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.intermediate_size == written.config["intermediate_size"] < 64
    seen = lw.evaluate(tmp_path / "out", against=deep, text=text, samples=16, length=32)
    assert seen.text is not None
    assert seen.text.kl == pytest.approx(done.comparison.kl, rel=0.5)


def test_biases_only_help(deep, text, tmp_path):
    """The same units without what stands in for them."""
    done = lw.compress(deep, tmp_path / "out", calibration=text, text=text, **FLAP)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    assert any(bool(one.any()) for one in biases)
    for one in biases:
        torch.nn.init.zeros_(one)
    model.save_pretrained(tmp_path / "without")
    for small in ("out", "without"):
        (tmp_path / small / "tokenizer.json").unlink(missing_ok=True)
    found = {
        small: lw.evaluate(tmp_path / small, against=deep, text=text, samples=16, length=32).text.kl
        for small in ("out", "without")
    }
    assert found["out"] < found["without"]
    assert done.comparison.kl < found["without"]


def test_units_of_zeros_are_counted_layer_by_layer(deep, text, tmp_path):
    done = lw.compress(deep, tmp_path / "out", calibration=text, widths="own", **FLAP)
    assert any("files stay as large" in note for note in done.notes)
    written = open_checkpoint(tmp_path / "out")
    kept = [
        int(written.read(f"model.layers.{n}.mlp.down_proj.weight").any(dim=0).sum())
        for n in range(3)
    ]
    assert len(set(kept)) > 1
    assert written.config["intermediate_size"] == 64


class Stops(Silent):
    """Gives up at a step of the work."""

    def __init__(self, at):
        self.at, self.stage_now = at, ""

    def stage(self, name, steps):
        self.stage_now = name

    def step(self, what):
        self.at -= self.stage_now == "transform"
        if not self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("asked", [FLAP, {"drop_blocks": 1, **QUICK}], ids=["units", "blocks"])
def test_a_stopped_run_ends_with_the_same_bytes(asked, deep, text, tmp_path):
    lw.compress(deep, tmp_path / "whole", calibration=text, **asked)
    with pytest.raises(KeyboardInterrupt):
        lw.compress(deep, tmp_path / "out", calibration=text, progress=Stops(2), **asked)
    assert not (tmp_path / "out").exists()
    lw.compress(deep, tmp_path / "out", calibration=text, **asked)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_plan_says_what_went(deep, text, tmp_path):
    asked = {**FLAP, "drop_blocks": 1, "bits": 4, "group": 8, "method": "gptq"}
    lw.compress(deep, tmp_path / "out", calibration=text, **asked)
    plan = tmp_path / "out" / "plan.yaml"
    assert {"narrow: flap", "keep: 0.7", "widths: shared", "drop_blocks: 1", "drop_by: lim"} < set(
        plan.read_text().splitlines()
    )
    lw.compress(deep, tmp_path / "again", plan=plan, calibration=text, **QUICK)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_a_block_less(deep, text, tmp_path):
    done = lw.compress(deep, tmp_path / "out", calibration=text, drop_blocks=2, **QUICK)
    assert done.proof is not None
    assert any("2 of 3 blocks went" in note for note in done.notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    names = set(open_checkpoint(tmp_path / "out").tensors)
    assert {name.split(".")[2] for name in names if "layers" in name} == {"0"}
    left = open_checkpoint(deep).size - open_checkpoint(tmp_path / "out").size
    assert left > 2 * 4 * (3 * 32 * 64 + 3 * 32 * 32)


def test_narrow_layers_are_quantized_in_every_way(deep, text, tmp_path):
    done = lw.compress(
        deep, tmp_path / "out", calibration=text, narrow="magnitude", keep=0.7, rotate="hadamard",
        budget="6bits", allow={"bits": (2, 4, 8)}, group=8, format="layerwise", **QUICK
    )  # fmt: skip
    assert done.comparison is not None
    assert done.proof is not None
    assert done.prediction is not None


def test_weights_alone_need_no_text_and_no_model(deep, tmp_path):
    done = lw.compress(deep, tmp_path / "out", narrow="magnitude", keep=0.7, proof="none")
    assert done.proof is None
    written = open_checkpoint(tmp_path / "out")
    assert written.size < open_checkpoint(deep).size
    assert "mlp_bias" not in written.config or not written.config["mlp_bias"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"narrow": "flap"}, "is to keep 1"),
        ({"narrow": "flap", "keep": 0.0}, "is to keep 0"),
        ({"keep": 0.5}, "nothing says which units"),
        ({"narrow": "flop", "keep": 0.5}, "no method 'narrow/flop'"),
        ({"narrow": "flap", "keep": 0.001}, "without channels"),
        ({"narrow": "flap", "keep": 0.5, "calibration": None}, "no text was given"),
        ({"drop_blocks": 3}, "are to go"),
        ({"drop_blocks": -1}, "are to go"),
        ({"drop_blocks": 1, "drop_by": "weight_error"}, "scores layers"),
        ({"pattern": "2-4"}, "not a pattern"),
        ({"pattern": "4:2"}, "not a pattern"),
        ({"pattern": "2:4", "density": 0.5}, "something else says it"),
        ({"pattern": "2:5"}, "windows of 5"),
    ],
)
def test_mistakes_are_refused_before_any_work(asked, said, deep, text, tmp_path):
    with pytest.raises(UserError) as error:
        lw.compress(deep, tmp_path / "out", **{"calibration": text, **QUICK, **asked})
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
def test_a_pattern_is_kept_in_the_files(pruner, deep, text, tmp_path):
    lw.compress(deep, tmp_path / "out", calibration=text, pruner=pruner, pattern="2:4", **QUICK)
    written = open_checkpoint(tmp_path / "out")
    for name in written.tensors:
        if "_proj" in name:
            zeros = (written.read(name).reshape(-1, 4) == 0).sum(dim=1)
            assert bool((zeros >= 2).all())
            assert float((zeros == 2).float().mean()) > 0.99
    assert "among: 4" in (tmp_path / "out" / "plan.yaml").read_text()
