"""`layerwise report`: the page of a finished run or sweep, drawn again."""

import json

import pytest
from report import made_up


@pytest.fixture
def swept(tmp_path):
    folder = tmp_path / "swept"
    folder.mkdir()
    (folder / "sweep.json").write_text(json.dumps(made_up.sweep().as_json()))
    return folder


def test_a_run_s_page_is_drawn_again(layerwise, llama, tmp_path):
    out = tmp_path / "out"
    said = layerwise("compress", llama, "-o", out, "--bits", 4, "--group", 16, "--proof", "none")
    assert said.status == 0, said.err
    assert f"in pictures: {out}/report.html" in said.err
    again = tmp_path / "new" / "again.html"
    said = layerwise("report", out, "-o", again, "--json")
    assert said.status == 0, said.err
    assert said.document == {"page": str(again)}
    assert str(again) in said.err
    assert again.read_text() == (out / "report.html").read_text()
    (out / "report.html").unlink()
    said = layerwise("report", out / "report.json")
    assert said.status == 0, said.err
    assert said.out == ""
    assert again.read_text() == (out / "report.html").read_text()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_sweep_s_page(layerwise, swept):
    said = layerwise("report", swept, "--json")
    assert said.status == 0, said.err
    assert said.document == {"page": str(swept / "sweep.html")}
    assert "Pareto front" in (swept / "sweep.html").read_text()


def test_a_page_is_never_overwritten(refuses, swept):
    (swept / "sweep.html").write_text("mine")
    says = (swept / "sweep.html", "exists already")
    refuses("report", swept, says=says, remedy="Choose another -o")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read"),
        ("[1]", "is the report of no run"),
        ('{"a": 1}', "is the report of no run"),
        ('{"points": 3}', "lacks 'model'"),
        ('{"points": 3, "model": "m", "text": ""}', "points is 3"),
        ('{"layers": [], "model": 7}', "model is 7, not text"),
    ],
)
def test_what_is_no_report(refuses, tmp_path, content, says):
    file = tmp_path / "report.json"
    file.write_text(content)
    refuses("report", file, says=(file, says), remedy="layerwise")


def test_a_place_without_a_report(refuses, llama, tmp_path, swept):
    refuses("report", llama, says=(llama, "report.json", "sweep.json"), remedy="layerwise compress")
    missing = tmp_path / "none"
    refuses("report", missing, says=(missing, "No such file"), remedy="layerwise sweep")
    (swept / "report.json").write_text("{}")
    refuses("report", swept, says=(swept, "report.json and sweep.json"), remedy="Name the one")


def test_a_page_that_cannot_be_written(refuses, swept, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    page = file / "page.html"
    refuses("report", swept, "-o", page, says=(page, "cannot be written"), remedy="another -o")
