"""Who may import whom, and what a file of a method may hold."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from layerwise.core.catalogue import VERBS

SOURCE = Path(__file__).resolve().parent.parent / "src" / "layerwise"
ROOMS = (*VERBS, "ensemble", "evaluate", "export", "flow", "report", "testing", "cli")
METHODS = [
    file for verb in VERBS for file in sorted((SOURCE / verb).glob("*.py")) if file.name[0] != "_"
]


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return {name for name in found if name.startswith("layerwise.")}


@pytest.mark.parametrize("file", sorted((SOURCE / "core").rglob("*.py")), ids=lambda f: f.name)
def test_core_imports_no_other_room(file):
    assert not {name for name in imports(file) if name.split(".")[1] in ROOMS}


@pytest.mark.parametrize("file", sorted((SOURCE / "evaluate").glob("*.py")), ids=lambda f: f.name)
def test_evaluation_imports_core_and_itself(file):
    """What it judges is given to it, loaded; only the room's own call names the library."""
    rooms = {name.split(".")[1] for name in imports(file)} - {"core", "evaluate"}
    assert rooms <= ({"api"} if file.name == "__init__.py" else set())


@pytest.mark.parametrize("file", METHODS, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_a_method_imports_core_and_its_room_s_shared_files(file):
    for name in imports(file):
        room, _, rest = name.removeprefix("layerwise.").partition(".")
        assert room == "core" or (room == file.parent.name and rest.startswith("_")), name


@pytest.mark.parametrize("file", METHODS, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_a_method_s_file_has_one_public_function(file):
    body = ast.parse(file.read_text()).body
    public = [n.name for n in body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"]
    assert public == [file.stem]


def test_only_the_face_prints():
    for file in SOURCE.rglob("*.py"):
        if file.parent.name != "cli":
            calls = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
            assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


def test_importing_layerwise_leaves_torch_alone():
    program = "import sys, layerwise, layerwise.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
