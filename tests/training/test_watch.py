"""Measures through training: what is recorded, and that training does not notice."""

import json

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from layerwise.core.errors import UserError
from layerwise.measure.displacement import displacement
from layerwise.measure.rotation import rotation
from layerwise.report.training_plots import training_svg
from layerwise.training import Watch
from layerwise.training.trainer import WatchCallback
from layerwise.training.watch import read_records


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def trained(model, steps, watch=None):
    torch.manual_seed(4)
    pictures, labels = torch.randn(32, 6), torch.randint(0, 3, (32,))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(steps):
        loss = functional.cross_entropy(model(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if watch is not None:
            watch.step(loss=float(loss.detach()))
    return model


def test_records_how_far_layers_are_from_their_start(tmp_path):
    model, out = net(), tmp_path / "new" / "layers.jsonl"
    start = [model[place].weight.detach().clone() for place in (0, 3)]
    watch = Watch(model, ["rotation", "displacement", "effective_rank"], out=out, every=4)
    trained(model, 10, watch)
    watch.record(10)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 4, 8, 10]
    assert lines[0]["scores"]["rotation"] == {"0": 0.0, "3": 0.0}
    assert "loss" in lines[1]
    assert "loss" not in lines[0]
    for place, before in zip((0, 3), start, strict=True):
        now = model[place].weight.detach()
        last = lines[-1]["scores"]
        assert last["rotation"][str(place)] == pytest.approx(rotation(now, before))
        assert last["displacement"][str(place)] == pytest.approx(displacement(now, before))
    assert [record.step for record in read_records(out)] == [0, 4, 8, 10]


def test_training_does_not_notice():
    plain, watched = net(), net()
    trained(plain, 6)
    text = torch.randn(5, 6)
    watch = Watch(watched, ["rotation", "sharpness", "weight_error"], every=1, text=text)
    trained(watched, 6, watch)
    assert watched.training
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)
        assert other.requires_grad
    assert len(watch.records) == 7


def test_compares_with_what_it_is_told_to():
    model, other = net(), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))
    watch = Watch(model, "rotation", against=other)
    expected = rotation(model[0].weight.detach(), other[0].weight.detach())
    assert watch.records[0].scores["rotation"]["0"] == pytest.approx(expected)


def test_a_step_is_recorded_once():
    watch = Watch(net(), "effective_rank", every=2)
    watch.step(2)
    watch.record(2)
    watch.step()
    watch.step()
    assert [record.step for record in watch.records] == [0, 2, 4]


def test_what_cannot_be_watched_is_refused(tmp_path):
    taken = tmp_path / "taken.jsonl"
    taken.write_text("mine\n")
    with pytest.raises(UserError, match="exists already"):
        Watch(net(), "rotation", out=taken)
    assert taken.read_text() == "mine\n"
    with pytest.raises(UserError, match="every 0 steps"):
        Watch(net(), "rotation", every=0)
    with pytest.raises(UserError, match="no method"):
        Watch(net(), "rotations")
    with pytest.raises(UserError, match="no text was given"):
        Watch(net(), "sharpness", out=tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()
    with pytest.raises(UserError, match="cannot be read"):
        read_records(taken)


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    out = tmp_path / "layers.jsonl"
    watch = Watch(net(), "effective_rank", out=out, every=1)
    watch.step()
    whole = out.read_text()
    out.write_text(whole + whole[:20])
    assert [record.step for record in read_records(out)] == [0, 1]


def test_draws_a_panel_per_measure(tmp_path):
    model = net()
    watch = Watch(model, ["rotation", "effective_rank"], every=1)
    trained(model, 3, watch)
    file = watch.plot(tmp_path / "new" / "layers.svg")
    drawn = file.read_text()
    assert all(f">{name}<" in drawn for name in ("rotation", "effective_rank", "loss"))
    assert drawn.count("<path") == 2 + 2 + 1
    with pytest.raises(UserError, match="exists already"):
        watch.plot(file)
    assert "Nothing was recorded" in training_svg([])


def test_watches_a_trainer(llama, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    ids = torch.arange(8 * 16).remainder(50).reshape(8, 16)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    out, picture = tmp_path / "layers.jsonl", tmp_path / "layers.svg"
    names = ["rotation", "alignment"]
    callback = WatchCallback(names, out=out, every=2, picture=picture, text=ids[:2])
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=5,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    records = read_records(out)
    assert [record.step for record in records] == [0, 2, 4, 5]
    turned = [sum(record.scores["rotation"].values()) for record in records]
    assert turned == sorted(turned)
    assert turned[0] == 0 < turned[1]
    alike = [sum(record.scores["alignment"].values()) for record in records]
    assert alike[0] < alike[-1]
    assert records[-1].told["loss"] > 0
    assert picture.exists()
