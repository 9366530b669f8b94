"""kill -9 at random moments: the same command goes on, and ends with the same bytes.

`LAYERWISE_KILLS=100 pytest tests/cli/test_killed.py` kills each command a hundred times.
"""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli import children

KILLS = int(os.environ.get("LAYERWISE_KILLS", "3"))
# What tells of times, or of where the output is.
PASSING = {
    "seconds",
    "work_seconds",
    "cpu_seconds",
    "peak_bytes",
    "disk_bytes",
    "environment",
    "recipe",
    "out",
    "forecast",
}
QUICK = ("--samples", 8, "--length", 32, "--text-samples", 8)


@pytest.fixture(scope="module")
def models(make_llama, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [make_llama(folder / name, blocks=4, shards=2) for name in ("one", "two")]


COMMANDS: dict[str, Callable[[list[Path], Path], list[object]]] = {
    "compress": lambda models, text: [
        *("compress", models[0], "--bits", 3, "--group", 16, "--method", "gptq"),
        *("--calibration", text, *QUICK),
    ],
    "merge": lambda models, text: ["merge", *models, "--weights", "0.7,0.3", "--text", text],
    "sweep": lambda models, text: [
        *("sweep", models[0], "--methods", "rtn,gptq", "--budgets", "3.5,4", "--group", 16),
        *("--calibration", text, *QUICK),
    ],
    "federate": lambda models, text: [
        *("federate", "digits", "--clients", 3, "--rounds", 6, "--epochs", 1),
    ],
}


def lasting(found: object) -> object:
    """A JSON document without what passes."""
    if isinstance(found, dict):
        return {key: lasting(value) for key, value in found.items() if key not in PASSING}
    return [lasting(one) for one in found] if isinstance(found, list) else found


def contents(folder: Path) -> dict[str, object]:
    """What every file says; pages, tables and recipes say times and places too."""
    made: dict[str, object] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".json":
            made[file.name] = lasting(json.loads(file.read_text()))
        elif file.is_file() and file.suffix not in (".html", ".csv") and file.stem != "recipe":
            made[str(file.relative_to(folder))] = file.read_bytes()
    return made


@pytest.mark.parametrize("verb", COMMANDS)
def test_killed_at_random_moments(verb, models, text, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    command = [*COMMANDS[verb](models, text), "-o", out]
    begun = time.perf_counter()
    assert children.run(command, log) == 0, log.read_text()
    usual = time.perf_counter() - begun
    expected = contents(out)
    shutil.rmtree(out)
    chance = random.Random(verb)
    kills = 0
    while kills < KILLS or not out.exists():
        if out.exists():
            assert contents(out) == expected
            shutil.rmtree(out)
        child = children.start(command, log)
        # Once there were enough, a run may end.
        child.join(chance.uniform(0, usual) if kills < KILLS else 120)
        child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL), log.read_text()
        kills += child.exitcode != 0
        assert kills < KILLS + 3, "a run that nobody killed did not end"
        # Whole, or not there.
        assert out.exists() == (child.exitcode == 0)
    assert contents(out) == expected
    left = {file.name for file in tmp_path.iterdir()} - {"out", "log", "log.events"}
    assert not left
