"""A run may be killed anywhere: the same command finishes it, to the same bytes."""

import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from cli import children
from cli.children import Fate

from layerwise.core.keeping.staging import arrange, stage
from layerwise.core.reading.checkpoint import TensorInfo

STEP = 1 << 13
BLOCKS = 6


@pytest.fixture(scope="module")
def deep(make_llama, tmp_path_factory) -> Path:
    """A model with enough blocks to be killed between them."""
    return make_llama(tmp_path_factory.mktemp("deep") / "model", blocks=BLOCKS, shards=2)


KINDS = ("calibrated", "weights")


def command(kind: str, model: Path, text: Path, out: Path) -> list[object]:
    made: list[object] = ["compress", model, "-o", out, "--bits", 3, "--group", 16]
    if kind == "weights":
        return [*made, "--density", 0.5, "--proof", "none"]
    windows = ("--samples", 8, "--length", 32, "--text-samples", 8)
    return [*made, "--method", "gptq", "--calibration", text, *windows]


@pytest.fixture(scope="module")
def whole(deep, text, tmp_path_factory):
    """The output of each kind of run that nobody killed, and the changes it made to the disk."""
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        log = folder / "log"
        status = children.run(command(kind, deep, text, folder / "out"), log, Fate(0, 0, STEP))
        assert status == 0, log.read_text()
        made[kind] = (contents(folder / "out"), children.events(log))
    return made


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, but for what tells of times and of where the output is."""
    made = {file.name: file.read_bytes() for file in folder.iterdir()}
    del made["report.json"], made["report.html"]
    recipe = made.pop("recipe.yaml").decode().splitlines()
    made["recipe.yaml"] = "\n".join(x for x in recipe if not x.startswith("  out:")).encode()
    return made


def lines(out: Path) -> int:
    journal = Path(f"{out}.partial") / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_changes_to_the_disk(kind, seed, deep, text, whole, tmp_path):
    expected, changes = whole[kind]
    chance = random.Random(seed)
    out, log = tmp_path / "out", tmp_path / "log"
    kills = 0
    for _ in range(20):
        fate = Fate(chance.randrange(1, changes // 2), 0, STEP)
        status = children.run(command(kind, deep, text, out), log, fate)
        assert status in (0, -signal.SIGKILL), log.read_text()
        if status == 0:
            break
        kills += 1
        assert not out.exists()
    else:
        assert children.run(command(kind, deep, text, out), log, Fate(0, 0, STEP)) == 0
    assert kills >= 2
    assert contents(out) == expected
    assert not Path(f"{out}.partial").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_killed_from_outside(kind, deep, text, whole, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    chance = random.Random(kind)
    landed = 0
    for wanted in sorted(chance.sample(range(1, BLOCKS), 3)):
        child = children.start(command(kind, deep, text, out), log, Fate(0, 0, STEP))
        while child.is_alive() and lines(out) < 1 + wanted:
            time.sleep(0.001)
        time.sleep(chance.random() / 100)
        child.kill()
        child.join()
        landed += child.exitcode == -signal.SIGKILL
        if child.exitcode == 0:
            break
        assert not out.exists()
    assert landed
    if not out.exists():
        assert children.run(command(kind, deep, text, out), log, Fate(0, 0, STEP)) == 0
    assert contents(out) == whole[kind][0]
    assert not Path(f"{out}.partial").exists()


@pytest.fixture(scope="module")
def stopped(deep, text, whole, tmp_path_factory):
    """Stops a run of a kind with some steps finished."""

    def stop(kind: str, out: Path) -> Path:
        child = children.start(
            command(kind, deep, text, out), out.with_name("log"), Fate(0, 0, STEP)
        )
        while child.is_alive() and lines(out) < 4:
            time.sleep(0.001)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        return Path(f"{out}.partial")

    return stop


def damage_tensor(partial: Path) -> None:
    """Flip one bit of a tensor that the second step wrote."""
    entries = [json.loads(line) for line in (partial / "journal.jsonl").read_text().splitlines()]
    name = next(iter(entries[2]["checksums"]))
    file = partial / "model.safetensors"
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    start = json.loads(data[8 : 8 + size])[name]["data_offsets"][0]
    data[8 + size + start] ^= 1
    file.write_bytes(data)


def damage_header(partial: Path) -> None:
    with (partial / "model.safetensors").open("r+b") as file:
        file.write(bytes(8))


def cut_shard(partial: Path) -> None:
    os.truncate(partial / "model.safetensors", 3000)


def lose_shard(partial: Path) -> None:
    (partial / "model.safetensors").unlink()


def cut_journal(partial: Path) -> None:
    os.truncate(partial / "journal.jsonl", (partial / "journal.jsonl").stat().st_size - 5)


def cut_first_line(partial: Path) -> None:
    os.truncate(partial / "journal.jsonl", 5)


def cut_state(partial: Path) -> None:
    for file in partial.glob("state-*"):
        os.truncate(file, 20)


DAMAGE = [
    *itertools.product(KINDS, (damage_tensor, cut_journal)),
    ("weights", damage_header),
    ("weights", cut_shard),
    ("weights", lose_shard),
    ("weights", cut_first_line),
    ("calibrated", cut_state),
]


@pytest.mark.parametrize(("kind", "damage"), DAMAGE)
def test_what_was_damaged_meanwhile_is_done_again(
    kind, damage, stopped, deep, text, whole, tmp_path
):
    out = tmp_path / "out"
    partial = stopped(kind, out)
    damage(partial)
    log = tmp_path / "log"
    assert children.run(command(kind, deep, text, out), log, Fate(0, 0, STEP)) == 0, log.read_text()
    assert contents(out) == whole[kind][0]


def test_finished_steps_are_not_done_again(stopped, deep, text, whole, tmp_path):
    log = tmp_path / "log"
    for kind in KINDS:
        out = tmp_path / kind
        stopped(kind, out)
        assert children.run(command(kind, deep, text, out), log, Fate(0, 0, STEP)) == 0
        assert children.events(log) < whole[kind][1]


# Staging alone, killed at each of its changes to the disk

INFOS = [TensorInfo(name, torch.float32, (4, 8)) for name in "abcde"]


def _stage_all(out: Path) -> None:
    staging = stage(out, arrange(INFOS, shard_bytes=300), "same", restart=False)
    left = staging.states()
    state = {"carried": left["carried"][:] if left else torch.zeros(3)}
    for number, info in enumerate(INFOS):
        if info.name in staging.steps:
            continue
        staging.write(info.name, torch.full((2, 8), number + state["carried"][0]))
        staging.write(info.name, torch.full((2, 8), 1 + number + state["carried"][1]), 2)
        state = {"carried": state["carried"] + 1}
        staging.finish_step(info.name, {}, state)
    staging.add({"note.json": b"{}", "copied.txt": out.parent / "source.txt"})
    staging.publish()


def _kill_at_every_change(folder: Path) -> None:
    (folder / "source.txt").write_text("carried over")
    _stage_all(folder / "whole")
    expected = {file.name: file.read_bytes() for file in (folder / "whole").iterdir()}
    for number in itertools.count(1):
        out = folder / f"out-{number}"
        statuses = []
        # Killed once, killed again at the same place, then left alone.
        for dies_at in (number, number, 0):
            child = os.fork()
            if not child:
                children.count_changes(dies_at)
                _stage_all(out)
                os._exit(0)
            statuses.append(os.waitpid(child, 0)[1])
            if out.exists():  # killed after the rename, it is whole
                break
        assert {file.name: file.read_bytes() for file in out.iterdir()} == expected, number
        assert not Path(f"{out}.partial").exists(), number
        if not statuses[0]:
            break
    sys.exit(0 if number > 30 else 1)


def test_staging_killed_at_every_change_to_the_disk(tmp_path):
    assert children.call(_kill_at_every_change, tmp_path) == 0
