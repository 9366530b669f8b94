import json

import models
import pytest
import torch

import layerwise as lw
from layerwise.core import catalogue
from layerwise.core.errors import UserError
from layerwise.core.reading.labelled import labelled

PAIRS = [(f"text number {n} is {'good' if n % 2 else 'bad'}", n % 2) for n in range(30)]


def _read(llama, given, **how):
    return labelled(lw.open(llama).source, given, **{"examples": 1000, "length": 64, **how})


def _texts(found):
    return {
        bytes(row[: last + 1].tolist()).decode(): found.classes[label]
        for row, last, label in zip(found.ids, found.last, found.labels, strict=True)
    }


def _written(folder, kind):
    file = folder / f"train.{kind}"
    if kind == "tsv":
        file.write_text("".join(f"{text}\t{label}\tmore\n" for text, label in PAIRS))
    elif kind == "csv":
        file.write_text("label,sentence\n" + "".join(f"{b},{a}\n" for a, b in PAIRS))
    elif kind == "jsonl":
        file.write_text("".join(json.dumps({"text": a, "label": b}) + "\n" for a, b in PAIRS))
    else:
        file.write_text(json.dumps([{"question": a, "label": b} for a, b in PAIRS]))
    return file


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "json"])
def test_reads_every_kind_of_file(llama, tmp_path, kind):
    found = _read(llama, _written(tmp_path, kind))
    assert _texts(found) == {text: str(label) for text, label in PAIRS}


def test_reads_directories(llama, tmp_path):
    _written(tmp_path, "tsv")
    assert _texts(_read(llama, tmp_path)) == {text: str(label) for text, label in PAIRS}
    folder = tmp_path / "folders"
    for number, (text, label) in enumerate(PAIRS):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        (folder / str(label) / f"{number}.txt").write_text(text)
    assert _texts(_read(llama, folder)) == {text: str(label) for text, label in PAIRS}


def test_draws_always_the_same_and_no_text_twice(llama):
    found = _read(llama, PAIRS * 2, examples=22)
    assert len(_texts(found)) == 22 == len(found.labels)
    assert found.ids.equal(_read(llama, PAIRS, examples=22).ids)


def test_reads_no_more_than_a_length(llama):
    found = _read(llama, PAIRS, length=9)
    assert found.ids.shape[1] == 9
    assert set(found.last.tolist()) == {8}


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        ([(text, 0) for text, _ in PAIRS], "1 classes"),
        (PAIRS[:8], "too few"),
        ([*PAIRS, ("alone", 2)], "of 2 there is one text alone"),
        ([(text, text) for text, _ in PAIRS], "one text alone"),
        ([("", 0), ("", 1)], "0 classes"),
    ],
)
def test_refuses_what_no_probe_can_learn(llama, pairs, told):
    with pytest.raises(UserError, match=told):
        _read(llama, pairs)


@pytest.mark.parametrize(
    ("content", "told"),
    [("", "no text"), ("one column\n", "no text"), ('{"text": "a"}', "no text and label")],
)
def test_refuses_files_that_hold_no_labels(llama, tmp_path, content, told):
    file = tmp_path / ("some.jsonl" if content.startswith("{") else "some.tsv")
    file.write_text(content)
    with pytest.raises(UserError, match=told):
        _read(llama, file)
    with pytest.raises(UserError, match="there is no file"):
        _read(llama, tmp_path / "other.tsv")


def test_refuses_a_model_that_reads_backwards(tmp_path):
    models.make("bert", tmp_path / "model")
    with pytest.raises(UserError, match="sees what fills"):
        labelled(lw.open(tmp_path / "model").source, PAIRS, examples=30, length=8)


def test_a_measure_of_labels_needs_labels_and_no_text(llama, tmp_path):
    with pytest.raises(UserError, match="--labels FILE"):
        lw.measure(llama, "concept_depth")
    found = lw.measure(llama, ["concept_depth", "zd"], labels=PAIRS)
    assert found.columns.keys() >= {"concept_depth.auc", "concept_depth.f1", "zd"}
    assert found.about.keys() == {"concept_depth"}


def test_states_are_those_of_the_last_token_of_each_text_alone(tmp_path, make_llama, text):
    from transformers import AutoModelForCausalLM

    from layerwise.core.catalogue import Method, Paper
    from layerwise.core.progress import Silent
    from layerwise.flow.preparing import Texts, prepare
    from layerwise.flow.survey import survey

    folder = make_llama(tmp_path / "model")
    seen = []

    def look(states, labels):
        seen.append((states, labels))
        return 0.0

    method = Method("measure", "look", look, Paper("", 2000), (), {}, "layer", "block")
    opened = lw.open(folder)
    # A calibration text of another length beside them.
    lim = catalogue.get("measure/lim")
    texts = Texts(text, 3, 64, labels=PAIRS, label_examples=20)
    made = prepare(opened.source, opened.structure, [method, lim], texts, proof="none")
    survey(made, {}, options={}, measures=[method, lim], progress=Silent())
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = made.labelled
    for number, (row, last) in enumerate(zip(found.ids, found.last, strict=True)):
        with torch.no_grad():
            told = model.model(row[None, : last + 1], output_hidden_states=True).hidden_states
        assert seen[0][0][number].allclose(told[1][0, -1], atol=1e-5)
        assert seen[0][1].equal(found.labels)
