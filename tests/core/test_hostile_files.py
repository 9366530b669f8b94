"""Files may come from anywhere: they are read, or refused as a mistake, and do nothing else."""

import json
import random

import pytest
import torch
from readers import READERS, SHARD, TENSORS, mutated, with_header
from safetensors.torch import save

from layerwise.core.errors import UserError
from layerwise.core.reading.checkpoint import INDEX, WEIGHTS, open_checkpoint

DEEP = b"[" * 100_000
# Nine levels of nine references each, to nine letters: 4 * 10^9 of them.
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
MERGES = "a0: &a0 {" + ", ".join(f"k{n}: 1" for n in range(100)) + "}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 100)}]}}\n" for n in range(1, 6)
)  # fmt: skip
BY_YAML = ("plan", "blend", "mergekit", "recipe")
BY_JSON = ("index", "config", "outcome", "labels")
# What scripts/fuzz.py found once, and what reading the code showed.
FOUND = {
    **{f"{name} nested too deeply": (name, DEEP) for name in (*BY_YAML, *BY_JSON)},
    **{f"{name} of references": (name, BOMB.encode()) for name in BY_YAML},
    **{f"{name} of merges": (name, MERGES.encode()) for name in BY_YAML},
    **{f"{name} with a day that is none": (name, b"model: 2001-99-99\n") for name in BY_YAML},
    **{f"{name} that is empty": (name, b"") for name in READERS},
    "a recipe for a model with too long a name": (
        "mergekit", b"merge_method: linear\nmodels: [{model: " + b"x" * 5000 + b"}]\n",
    ),
    "a dtype that is a list": (
        "mergekit", b"merge_method: linear\ndtype: [a]\nmodels: [{model: HERE}]\n",
    ),
    "a range of one number": (
        "mergekit",
        b"merge_method: passthrough\nslices: [{sources: [{model: HERE, layer_range: [1]}]}]\n",
    ),
    "parameters that are text": (
        "mergekit", b"merge_method: linear\nmodels: [{model: HERE, parameters: text}]\n",
    ),
    "a number among filters": (
        "mergekit",
        b"merge_method: linear\nmodels: [{model: HERE, parameters: "
        b"{weight: [1, {filter: a, value: 1}]}}]\n",
    ),
    "an index with too long a name": (
        "index", json.dumps({"weight_map": {"bias": "x" * 5000}}).encode(),
    ),
    "a signature that tells nothing": (
        "signature", save(TENSORS, {"layerwise": "signature", "signature": "null"}),
    ),
    "a signature of a vast shape": (
        "signature",
        save(
            {"bias": torch.zeros(1, 4, dtype=torch.int32)},
            {
                "layerwise": "signature",
                "signature": json.dumps(
                    {"bits": 4, "ranges": {"bias": [[1 << 40], 0, 1]}, "apart": {}}
                ),
            },
        ),
    ),
    "a header of a vast tensor": (
        "shard",
        with_header(
            json.dumps({
                "w": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 8]}
            }).encode(),
            bytes(8),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_usual_files_are_read(name, tmp_path):
    for number, seed in enumerate(READERS[name].seeds):
        (tmp_path / str(number)).mkdir()
        if name != "labels":  # of which each is of another suffix
            READERS[name](seed, tmp_path / str(number))


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_refused(name, tmp_path):
    reader, content = FOUND[name]
    with pytest.raises(UserError):
        READERS[reader](content, tmp_path)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name, tmp_path):
    chance, reader = random.Random(name), READERS[name]
    read = 0
    for _ in range(100):
        try:
            reader(mutated(chance.choice(reader.seeds), chance, reader.headed), tmp_path)
            read += 1
        except UserError:
            pass
    assert read < 100


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", ".", ""])
def test_an_index_reaches_no_other_directory(name, tmp_path):
    (tmp_path / WEIGHTS).write_bytes(SHARD)
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, name)}))
    with pytest.raises(UserError, match=r"not a shard index|not there"):
        open_checkpoint(inside)


def test_a_config_of_other_kinds_is_no_gguf_model(tmp_path):
    (tmp_path / WEIGHTS).write_bytes(SHARD)
    (tmp_path / "config.json").write_text('{"quantization_config": ["gguf"]}')
    assert set(open_checkpoint(tmp_path).tensors) == set(TENSORS)
