"""Pruned models whose blocks are learned anew: closer to the original, as sparse as before."""

import pytest
import torch

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.reading.checkpoint import open_checkpoint

QUICK = {"samples": 16, "text_samples": 8, "length": 32, "noise_floor": False, "cache": False}
PRUNED = {"pruner": "magnitude", "density": 0.4, **QUICK}


def steps(name, count=30, **others):
    return {"recover": name, "options": {f"recover/{name}": {"steps": count, **others}}}


@pytest.fixture(scope="module")
def made(llama, text, tmp_path_factory):
    """The pruned model, and what became of it when it was learned anew, by the method's name."""
    found = {}
    for name, how in {
        "none": {},
        "nothing": steps("masklora", 0),
        "vectors": steps("vectors"),
        "masklora": steps("masklora"),
    }.items():
        folder = tmp_path_factory.mktemp(name) / "out"
        report = lw.compress(llama, folder, calibration=text, text=text, **PRUNED, **how)
        found[name] = (report, open_checkpoint(folder))
    return found


def test_it_comes_closer_to_the_original(made):
    kl = {name: report.comparison.kl for name, (report, _) in made.items()}
    assert kl["none"] > 0.05
    assert kl["masklora"] < 0.9 * kl["none"]
    assert kl["vectors"] < kl["none"]


def test_files_answer_as_the_model_in_memory(made):
    for report, _ in made.values():
        assert report.proof.largest_difference <= report.proof.allowed


def test_what_was_pruned_stays_gone(made):
    (_, before), (_, after) = made["none"], made["masklora"]
    moved = 0
    for name in before.tensors:
        first, second = before.read(name), after.read(name)
        if "_proj" in name:
            assert torch.equal(first == 0, second == 0)
            moved += not torch.equal(first, second)
    assert moved == 14


def test_vectors_alone_leave_the_weights(made):
    (_, before), (_, after) = made["none"], made["vectors"]
    for name in before.tensors:
        same = torch.equal(before.read(name), after.read(name))
        assert same == ("layernorm" not in name)


def test_no_step_changes_nothing(made):
    (_, before), (_, after) = made["none"], made["nothing"]
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)


def test_the_report_and_the_plan_say_it(made, tmp_path):
    report, written = made["masklora"]
    assert any("recovered: 14 pruned layers" in note for note in report.notes)
    assert all("learned anew" in " ".join(row.notes) for row in report.layers)
    assert "recover: masklora" in (written.path / "plan.yaml").read_text()


def test_what_is_learned_is_the_same_from_its_plan(made, llama, text, tmp_path):
    _, written = made["masklora"]
    plan = written.path / "plan.yaml"
    lw.compress(llama, tmp_path / "out", plan=plan, calibration=text, text=text, **QUICK)
    again = open_checkpoint(tmp_path / "out")
    assert all(torch.equal(written.read(n), again.read(n)) for n in written.tensors)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"bits": 4, "group": 8}, "no layer is pruned"),
        ({"density": 0.5, "bits": 4, "group": 8}, "not quantized"),
        ({"density": 0.5, "recover": "lora"}, "no method 'recover/lora'"),
        ({"density": 0.5, "calibration": None}, "no text was given"),
        ({"density": 0.5, "options": {"recover/masklora": {"rate": -1.0}}}, "rate is -1"),
    ],
)
def test_mistakes_are_refused(asked, said, llama, text, tmp_path):
    with pytest.raises(UserError) as error:
        lw.compress(
            llama,
            tmp_path / "out",
            **{"calibration": text, "recover": "masklora", **QUICK, **asked},
        )
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()
