"""Tasks: scored as by hand, kept by content, refused before a model is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

import layerwise as lw
from layerwise.core.errors import UserError

pytest.importorskip("lm_eval")

LETTERS = "abcdefgh "


@pytest.fixture(scope="module")
def speaker(make_llama, tmp_path_factory) -> Path:
    """A model whose tokens are letters."""
    model = make_llama(tmp_path_factory.mktemp("speaker") / "model")
    words = {"<s>": 0, "</s>": 1} | {letter: 2 + n for n, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<s>",
            }
        )
    )
    return model


@pytest.fixture(scope="module")
def worse(speaker, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("worse") / "out"
    lw.compress(speaker, out, bits=2, group=16, format="layerwise", proof="none")
    return out


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Two tasks of our own, with their data; and a cache of our own."""
    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "tasks"
    made.mkdir()
    for name, count in (("letters", 30), ("few", 4)):
        generator = torch.Generator().manual_seed(count)
        draw = torch.randint(len(LETTERS), (count, 12), generator=generator).tolist()
        written = ["".join(LETTERS[n] for n in row) for row in draw]
        documents = [
            {"question": w[:6], "choices": [w[6:9], w[9:12]], "answer": number % 2}
            for number, w in enumerate(written)
        ]
        (made / f"{name}.jsonl").write_text("\n".join(map(json.dumps, documents)))
        (made / f"{name}.yaml").write_text(task(name, made / f"{name}.jsonl"))
    return made


def task(name: str, data: Path) -> str:
    return f"""
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
target_delimiter: ""
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 2.0}}
"""


def by_hand(model: Path, data: Path) -> list[float]:
    """Whether the right choice is the likelier one, item by item."""
    loaded = lw.load(model)
    hits: list[float] = []
    for line in data.read_text().splitlines():
        item = json.loads(line)
        scores: list[float] = []
        for choice in item["choices"]:
            ids = torch.tensor([[2 + LETTERS.index(c) for c in item["question"] + choice]])
            with torch.no_grad():
                scored = loaded(ids).logits[0].log_softmax(-1)
            start = len(item["question"])
            scores.append(sum(float(scored[n - 1, ids[0, n]]) for n in range(start, len(ids[0]))))
        hits.append(float(scores.index(max(scores)) == item["answer"]))
    return hits


def test_a_task_is_scored_as_by_hand(speaker, folder):
    found = lw.evaluate(speaker, tasks="letters", include_path=folder)
    assert found.text is None
    (score,) = found.tasks
    hits = torch.tensor(by_hand(speaker, folder / "letters.jsonl"), dtype=torch.float64)
    assert 0 < hits.mean() < 1
    assert score.value == pytest.approx(float(hits.mean()))
    assert score.error == pytest.approx(float(hits.std()) / 30**0.5)
    assert (score.task, score.metric, score.items, score.fewshot) == ("letters", "acc", 30, 0)
    assert (score.version, score.higher_is_better, score.cached) == ("2.0", True, False)


def test_the_difference_is_of_each_item_against_itself(speaker, worse, folder):
    (score,) = lw.evaluate(worse, against=speaker, tasks=["letters"], include_path=folder).tasks
    one, other = (
        torch.tensor(by_hand(m, folder / "letters.jsonl"), dtype=torch.float64)
        for m in (worse, speaker)
    )
    assert not torch.equal(one, other)
    assert score.before == pytest.approx(float(other.mean()))
    assert score.difference == pytest.approx(float((one - other).mean()))
    assert score.difference_error == pytest.approx(float((one - other).std()) / 30**0.5)
    assert score.paired


def test_packed_files_are_put_to_tasks_too(speaker, folder, tmp_path):
    wish = {"bits": 4, "group": 16, "symmetric": True, "proof": "none"}
    lw.compress(speaker, tmp_path / "out", **wish, format="compressed-tensors")
    (score,) = lw.evaluate(tmp_path / "out", tasks="few", include_path=folder).tasks
    assert score.value == pytest.approx(sum(by_hand(tmp_path / "out", folder / "few.jsonl")) / 4)


def test_what_is_known_needs_no_model(speaker, folder, request):
    first = lw.evaluate(speaker, tasks="letters,few", include_path=folder).tasks
    request.getfixturevalue("no_load")
    again = lw.evaluate(speaker, tasks="letters,few", include_path=folder).tasks
    assert [score.cached for score in first] == [False, False]
    assert [score.cached for score in again] == [True, True]
    assert [score.value for score in again] == [score.value for score in first]
    with pytest.raises(AssertionError, match="a model was loaded"):
        lw.evaluate(speaker, tasks="letters", include_path=folder, limit=3)
    with pytest.raises(AssertionError, match="a model was loaded"):
        lw.evaluate(speaker, tasks="letters", include_path=folder, cache=False)


def test_the_key_is_content(speaker, folder, tmp_path):
    first = lw.evaluate(speaker, tasks="few", include_path=folder).tasks[0]
    copied = shutil.copytree(speaker, tmp_path / "elsewhere")
    (copied / "README.md").write_text("prose moves no answer")
    assert lw.evaluate(copied, tasks="few", include_path=folder).tasks[0].cached
    weights = copied / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    changed = lw.evaluate(copied, tasks="few", include_path=folder).tasks[0]
    assert not changed.cached
    assert not first.cached


def test_changed_items_and_settings_are_asked_anew(speaker, folder):
    assert not lw.evaluate(speaker, tasks="few", include_path=folder).tasks[0].cached
    file = folder / "few.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[::-1]))
    assert not lw.evaluate(speaker, tasks="few", include_path=folder).tasks[0].cached
    yaml = folder / "few.yaml"
    yaml.write_text(yaml.read_text().replace('"{{question}}"', '"{{question}} "'))
    assert not lw.evaluate(speaker, tasks="few", include_path=folder).tasks[0].cached
    assert lw.evaluate(speaker, tasks="few", include_path=folder).tasks[0].cached


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "a figure": lambda file: flip(file, file.read_bytes().index(b"value") + 12),
    "empty": lambda file: file.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_found_and_made_again(speaker, folder, tmp_path, damage):
    first = lw.evaluate(speaker, tasks="few", include_path=folder).tasks[0]
    (entry,) = (tmp_path / "cache" / "tasks").rglob("*.safetensors")
    sound = entry.read_bytes()
    damage(entry)
    assert entry.read_bytes() != sound
    found = lw.evaluate(speaker, tasks="few", include_path=folder)
    assert found.tasks == [first]
    assert not found.tasks[0].cached
    assert any("damaged" in note for note in found.notes)
    assert lw.evaluate(speaker, tasks="few", include_path=folder).tasks[0].cached


def test_where_results_are_kept(speaker, folder, tmp_path, monkeypatch):
    monkeypatch.delenv("LAYERWISE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    lw.evaluate(speaker, tasks="few", include_path=folder, cache=False)
    assert not (tmp_path / "xdg").exists()
    lw.evaluate(speaker, tasks="few", include_path=folder)
    assert len(list((tmp_path / "xdg" / "layerwise" / "tasks").rglob("*.safetensors"))) == 1
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_noted(speaker, folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path / "file"))
    found = lw.evaluate(speaker, tasks="few", include_path=folder)
    assert found.tasks[0].items == 4
    assert any("could not be written" in note for note in found.notes)


def test_random_numbers_of_the_caller_are_left_alone(speaker, folder):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    lw.evaluate(speaker, tasks="few", include_path=folder)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"tasks": "few", "limit": 0}, "limit is 0"),
        ({"tasks": "few", "batch_size": 0}, "batch_size is 0"),
        ({"tasks": "few", "num_fewshot": -1}, "num_fewshot is -1"),
        ({"tasks": "few", "include_path": "nowhere"}, "no directory nowhere"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_makes_no_sense(speaker, folder, no_load, asked, says):
    with pytest.raises(UserError, match=says):
        lw.evaluate(speaker, **{"include_path": folder, **asked})


def test_a_name_that_is_close_is_offered(speaker, folder, no_load):
    with pytest.raises(UserError, match="no task 'leters'") as refused:
        lw.evaluate(speaker, tasks="leters", include_path=folder)
    assert "letters" in refused.value.remedy


def test_data_that_is_not_there(speaker, folder, no_load):
    (folder / "few.jsonl").unlink()
    with pytest.raises(UserError, match="few cannot be loaded"):
        lw.evaluate(speaker, tasks="few", include_path=folder)


def test_a_model_without_a_tokenizer(llama, folder, no_load):
    with pytest.raises(UserError, match="no tokenizer"):
        lw.evaluate(llama, tasks="few", include_path=folder)


def test_a_model_that_does_not_continue_text(tmp_path, folder, no_load):
    import models

    models.make("vit", tmp_path / "vit")
    with pytest.raises(UserError, match="does not continue a text"):
        lw.evaluate(tmp_path / "vit", tasks="few", include_path=folder)
