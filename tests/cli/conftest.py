"""The command line, called in this process."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from layerwise.cli import main


@dataclass(frozen=True)
class Said:
    """What a command printed, and its status."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout: anything beside it is an error here."""
        return json.loads(self.out)


Command = Callable[..., Said]


@pytest.fixture
def layerwise(capsys) -> Command:
    def command(*words: object) -> Said:
        capsys.readouterr()
        status = main([str(word) for word in words])
        printed = capsys.readouterr()
        return Said(status, printed.out, printed.err)

    return command


@pytest.fixture
def refuses(layerwise, tmp_path):
    """Runs a command that must be refused, and gives its message."""

    def refused(*words: object, says: tuple[object, ...], remedy: str) -> str:
        before = contents(tmp_path)
        said = layerwise(*words, "--json")
        assert said.status == 2, said.err
        problem = said.document["error"]
        assert said.document.keys() == {"error", "remedy"}
        assert said.err.endswith(f"layerwise: {problem}\n{said.document['remedy']}\n")
        assert "Traceback" not in said.err
        for part in says:
            assert str(part) in problem
        assert remedy in said.document["remedy"]
        assert contents(tmp_path) == before
        return said.document["remedy"]

    return refused


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
