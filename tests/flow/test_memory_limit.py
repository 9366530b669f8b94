"""A limit of memory: refused before work with one that works, kept without changing a byte."""

import re
from dataclasses import replace

import pytest
import torch
import yaml

import layerwise as lw
from layerwise.cli import main
from layerwise.core.economy import LAVISH, Economy, memory_limit, shown
from layerwise.core.errors import UserError
from layerwise.core.progress import Silent
from layerwise.core.telling.forecast import Foresight

TEXT = torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(1))
RTN = {"bits": 4, "group": 16, "format": "layerwise"}
GPTQ = {**RTN, "method": "gptq", "calibration": TEXT[:8], "samples": 8, "length": 32}
BUDGET = {"budget": "5bits", "format": "layerwise", "samples": 8, "length": 32}
PROVEN = {"text": TEXT[8:], "text_samples": 4, "length": 32}


def weights(out):
    return {file.name: file.read_bytes() for file in sorted(out.glob("*.safetensors"))}


class Stages(Silent):
    """Notes the stages that begin."""

    def __init__(self):
        self.begun = []

    def stage(self, name, steps):
        self.begun.append(name)


def least_of(refused):
    named = re.search(r"--max-memory (\S+) or more", refused.value.remedy)
    assert named is not None
    # This process's own memory moves by a little from one run to the next.
    return shown(memory_limit(named[1]) + (32 << 20))


@pytest.mark.parametrize("wish", [{**RTN, "proof": "none"}, {**GPTQ, **PROVEN}])
def test_a_limit_that_cannot_be_kept_names_one_that_can(llama, tmp_path, wish):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="1MiB is allowed") as refused:
        lw.compress(llama, out, **wish, max_memory="1MiB")
    assert not list(tmp_path.iterdir())
    report = lw.compress(llama, out, **wish, max_memory=least_of(refused))
    assert report.layers
    assert (out / "config.json").exists()


def test_weights_alone_give_the_same_bytes_within_a_limit(llama, tmp_path, monkeypatch):
    lw.compress(llama, tmp_path / "free", **RTN, proof="none")
    monkeypatch.setattr(Foresight, "economies", lambda _: [Economy(read_bytes=1 << 10)])
    report = lw.compress(llama, tmp_path / "kept", **RTN, proof="none", max_memory="64GiB")
    assert any("at a time" in note for note in report.notes)
    assert weights(tmp_path / "kept") == weights(tmp_path / "free") != {}


@pytest.mark.parametrize("inputs", ["original", "transformed"])
@pytest.mark.parametrize("economy", [LAVISH, Economy(on_disk=True, input_by_input=True)])
def test_activations_on_disk_change_no_bit(llama, tmp_path, monkeypatch, inputs, economy):
    wish = {**GPTQ, **PROVEN, "format": "compressed-tensors"}
    plan = lw.plan(llama, budget="5bits", **{k: v for k, v in wish.items() if k != "bits"})
    plan = replace(plan, inputs=inputs)
    texts = {name: wish[name] for name in ("calibration", "samples", *PROVEN)}
    free = lw.compress(llama, tmp_path / "free", plan=plan, cache=False, **texts)
    monkeypatch.setattr(
        "layerwise.flow.compressing.promised", lambda seen, *_: (economy, seen.forecast(economy))
    )
    kept = lw.compress(llama, tmp_path / "kept", plan=plan, cache=False, **texts)
    assert weights(tmp_path / "kept") == weights(tmp_path / "free") != {}
    assert kept.comparison == free.comparison
    assert kept.noise_floor == free.noise_floor
    assert kept.notes[-len(economy.notes()) or len(kept.notes) :] == economy.notes()
    assert not list((tmp_path / "kept").glob("*.tensors"))


@pytest.mark.parametrize("sensitivity", ["fisher", "kl"])
def test_a_plan_found_with_activations_on_disk_is_the_same(llama, monkeypatch, sensitivity):
    wish = {**BUDGET, "calibration": TEXT[:8], "method": "gptq", "sensitivity": sensitivity}
    free = lw.plan(llama, **wish, cache=False)
    economy = Economy(on_disk=True, input_by_input=True)
    monkeypatch.setattr(
        "layerwise.flow.planning.promised_search",
        lambda seen, *_: (economy, seen.forecast(economy)),
    )
    assert lw.plan(llama, **wish, cache=False) == free


def test_the_smallest_plan_of_a_quality_found_on_disk_is_the_same(llama, monkeypatch):
    wish = {"max_kl": 0.02, "format": "layerwise", "calibration": TEXT[:8], **PROVEN, "samples": 8}
    free = lw.plan(llama, **wish, cache=False)
    economy = Economy(on_disk=True)
    monkeypatch.setattr(
        "layerwise.flow.planning.promised_search",
        lambda seen, *_: (economy, seen.forecast(economy)),
    )
    assert lw.plan(llama, **wish, cache=False) == free


def test_a_limit_holds_while_a_plan_is_looked_for(llama, tmp_path):
    wish = {**BUDGET, "calibration": TEXT[:8], "cache": False, **PROVEN}
    stages = Stages()
    with pytest.raises(UserError, match="looking for a plan needs") as refused:
        lw.plan(llama, **wish, max_memory="1MiB", progress=stages)
    assert stages.begun == []
    assert lw.plan(llama, **wish, max_memory=least_of(refused)).layers
    stages.begun.clear()
    with pytest.raises(UserError, match="1MiB is allowed"):
        lw.compress(llama, tmp_path / "out", **wish, max_memory="1MiB", progress=stages)
    assert stages.begun == []
    assert not list(tmp_path.iterdir())


def test_what_carrying_a_plan_out_takes_is_refused_before_it_is_looked_for(
    llama, tmp_path, monkeypatch
):
    stages = Stages()
    monkeypatch.setattr(
        "layerwise.flow.planning.promised_search", lambda seen, *_: (LAVISH, seen.forecast())
    )
    with pytest.raises(UserError, match="the run needs at least"):
        lw.compress(
            llama,
            tmp_path / "out",
            **{**BUDGET, **PROVEN},
            calibration=TEXT[:8],
            cache=False,
            max_memory="1MiB",
            progress=stages,
        )
    assert stages.begun == []


SWEPT = {"calibration": TEXT[:8], **PROVEN, "samples": 8, "format": "layerwise", "cache": False}
POINTS = {"methods": ["rtn"], "budgets": ["5"]}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_limit_holds_for_a_sweep(llama, tmp_path, processes):
    stages = Stages()
    how = {**SWEPT, **POINTS, "processes": processes, "progress": stages}
    with pytest.raises(UserError, match="the sweep needs") as refused:
        lw.sweep(llama, tmp_path / "out", **how, max_memory="1MiB")
    assert stages.begun == []
    if processes == 1:
        assert lw.sweep(llama, tmp_path / "out", **how, max_memory=least_of(refused)).points


def test_a_sweep_with_activations_on_disk_finds_the_same(llama, tmp_path, monkeypatch):
    free = lw.sweep(llama, tmp_path / "free", **SWEPT, **POINTS)
    economy = Economy(on_disk=True, input_by_input=True)
    monkeypatch.setattr(
        "layerwise.flow.sweeping.fitting", lambda forecast, *_: (economy, forecast(economy))
    )
    kept = lw.sweep(llama, tmp_path / "kept", **SWEPT, **POINTS, max_memory="64GiB")
    assert [(one.bytes, one.kl) for one in kept.points] == [
        (one.bytes, one.kl) for one in free.points
    ]
    assert any("on disk" in note for note in kept.notes)


def test_a_recipe_takes_a_limit(llama, tmp_path, capsys):
    out, file = tmp_path / "out", tmp_path / "recipe.yaml"
    asked = {"model": str(llama), "out": str(out), **RTN, "proof": "none", "max_memory": "1MiB"}
    file.write_text(yaml.safe_dump({"compress": asked}))
    assert main(["run", str(file)]) == 2
    assert "1MiB is allowed" in capsys.readouterr().err
    asked["max_memory"] = "64GiB"
    file.write_text(yaml.safe_dump({"compress": asked}))
    assert main(["run", str(file)]) == 0
    assert yaml.safe_load((out / "recipe.yaml").read_text())["compress"]["max_memory"] == "64GiB"


@pytest.mark.parametrize("limit", ["much", "4", "0GiB", "-1GiB", "4 gigs"])
def test_what_is_no_amount_is_refused(llama, tmp_path, capsys, limit):
    words = ("compress", llama, "-o", tmp_path / "out", "--bits", 4, "--group", 16)
    assert main([*map(str, words), f"--max-memory={limit}"]) == 2
    assert "is not an amount of memory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
