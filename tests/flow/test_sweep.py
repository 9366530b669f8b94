"""A sweep: one calibration, every point, taken up where it stopped."""

import csv
import json
from pathlib import Path

import pytest
import torch

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.flow import sweeping

TEXT = torch.arange(12 * 32).remainder(251).reshape(12, 32)
TEXTS = {"calibration": TEXT[:8], "samples": 8, "length": 32, "text": TEXT[8:], "text_samples": 4}
SWEEP = {"methods": ["rtn", "gptq"], "budgets": ["4", "60%"], "uniform": True, "group": 16}
SWEEP |= {"format": "layerwise", "allow": {"bits": [2, 3, 4]}, **TEXTS}
POINTS = 2 * (2 + 3)


class Stages:
    def __init__(self):
        self.names = []

    def stage(self, name, steps):
        self.names.append(name)

    def step(self, what):
        pass


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path / "kept"))


def figures(found):
    return [(p.method, p.budget, p.uniform, p.bits, p.bytes, p.kl, p.front) for p in found.points]


@pytest.fixture(scope="module")
def reference(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "out"
    return lw.sweep(llama, folder, **SWEEP, cache=False), folder


def test_every_method_at_every_budget_and_width(reference):
    found, folder = reference
    assert len(found.points) == POINTS
    assert {"sweep.json", "sweep.csv", "sweep.svg", "sweep.html", "recipe.yaml", "plans"} == {
        file.name for file in folder.iterdir()
    }
    assert len(list((folder / "plans").iterdir())) == POINTS
    rows = list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
    assert [float(row["kl"]) for row in rows] == [point.kl for point in found.points]
    assert json.loads((folder / "sweep.json").read_text())["model"] == found.model
    for point in found.points:
        if point.budget == "4bits" and not point.uniform:
            assert point.bits <= 4
        beaten = [o for o in found.points if o.bytes < point.bytes and o.kl < point.kl]
        assert not (point.front and beaten)
    by_name = {(p.method, p.budget): p for p in found.points}
    assert by_name["gptq", "2bits"].kl < by_name["rtn", "2bits"].kl
    assert by_name["gptq", "4bits"].kl < by_name["gptq", "2bits"].kl


def test_a_point_is_what_compress_makes_of_its_plan(reference, llama, tmp_path):
    found, folder = reference
    point = next(p for p in found.points if (p.method, p.budget) == ("gptq", "60%"))
    report = lw.compress(llama, tmp_path / "out", plan=folder / point.out, **TEXTS)
    assert report.bytes_after == point.bytes
    assert report.average_bits == pytest.approx(point.bits)
    assert report.comparison.kl == pytest.approx(point.kl, rel=1e-4)
    before = Path(lw.open(llama).source.folder, "model.safetensors").stat().st_size
    assert point.bytes <= 0.6 * before


def test_a_stopped_sweep_is_taken_up(reference, llama, tmp_path, monkeypatch):
    find, done = sweeping.find, []

    def fails_later(setting, prepared, point):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(point.name)
        return find(setting, prepared, point)

    monkeypatch.setattr(sweeping, "find", fails_later)
    with pytest.raises(KeyboardInterrupt):
        lw.sweep(llama, tmp_path / "out", **SWEEP)
    assert not (tmp_path / "out").exists()
    again, stages = [], Stages()

    def remembers(setting, prepared, point):
        again.append(point.name)
        return find(setting, prepared, point)

    monkeypatch.setattr(sweeping, "find", remembers)
    with pytest.raises(UserError, match="with other arguments"):
        lw.sweep(llama, tmp_path / "out", **{**SWEEP, "budgets": ["5"]})
    journal = tmp_path / "out.partial" / sweeping.POINTS
    journal.write_text(journal.read_text()[:-9])  # the last line was cut short
    found = lw.sweep(llama, tmp_path / "out", **SWEEP, progress=stages)
    assert "measure" not in stages.names
    assert again == [*done[3:4], *again[1:]]
    assert len(again) == POINTS - 3
    assert figures(found) == figures(reference[0])
    with pytest.raises(UserError, match="exists already"):
        lw.sweep(llama, tmp_path / "out", **SWEEP)


def test_in_processes(reference, llama, tmp_path):
    some = {**SWEEP, "methods": ["gptq"], "uniform": False}
    found = lw.sweep(llama, tmp_path / "out", **some, processes=2)
    expected = {(p.method, p.budget): p for p in reference[0].points if not p.uniform}
    for point in found.points:
        assert point.bytes == expected[point.method, point.budget].bytes
        assert point.kl == pytest.approx(expected[point.method, point.budget].kl, rel=1e-3)


def test_on_a_ray_cluster(reference, llama, tmp_path):
    """A real one, of this machine alone."""
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    some = {**SWEEP, "methods": ["gptq"], "uniform": False}
    found = lw.sweep(llama, tmp_path / "out", **some, ray="auto")
    assert not ray.is_initialized()
    expected = {(p.method, p.budget): p for p in reference[0].points if not p.uniform}
    for point in found.points:
        assert point.bytes == expected[point.method, point.budget].bytes
        assert point.kl == pytest.approx(expected[point.method, point.budget].kl, rel=1e-3)


def test_no_cluster_at_an_address(llama, tmp_path):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    with pytest.raises(UserError, match="no Ray cluster"):
        lw.sweep(llama, tmp_path / "out", **SWEEP, ray="127.0.0.1:1")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"methods": []}, "needs methods"),
        ({"budgets": [], "uniform": False}, "needs methods and budgets"),
        ({"methods": ["gtpq"]}, "no method"),
        ({"budgets": ["many"]}, "not a budget"),
        ({"budgets": ["1"]}, "lowest levels take"),
        ({"allow": {"bits": [2, 17]}}, "17"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_any_work(llama, tmp_path, changes, says):
    with pytest.raises(UserError) as refused:
        lw.sweep(llama, tmp_path / "out", **{**SWEEP, **changes})
    assert says in f"{refused.value.problem} {refused.value.remedy}"
    assert not (tmp_path / "out.partial").exists()
