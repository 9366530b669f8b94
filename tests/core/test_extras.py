"""What is missing is said before the work, with the command that installs it."""

import builtins
import sys

import pytest

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.extras import need


@pytest.fixture
def missing(monkeypatch):
    """Makes a package impossible to import."""
    importing = builtins.__import__

    def miss(package: str) -> None:
        def refuse(name, *args, **kwargs):
            if name.partition(".")[0] == package:
                raise ImportError(f"No module named {package!r}")
            return importing(name, *args, **kwargs)

        for name in [n for n in sys.modules if n.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setattr(builtins, "__import__", refuse)

    return miss


@pytest.mark.parametrize(
    ("package", "extra"),
    [
        ("transformers", "layerwise[transformers]"),
        ("datasets", "layerwise[datasets]"),
        ("compressed_tensors", "layerwise[compressed-tensors]"),
        ("lm_eval", "layerwise[tasks]"),
        ("PIL", "layerwise[images]"),
    ],
)
def test_the_remedy_installs_it(missing, package, extra):
    missing(package)
    with pytest.raises(UserError, match=package) as refused:
        need(package, "this")
    assert extra in refused.value.remedy


def test_a_loader_that_is_missing_is_missed_before_the_work(missing, llama, text, tmp_path):
    missing("compressed_tensors")
    with pytest.raises(UserError, match="the proof"):
        lw.compress(
            llama,
            tmp_path / "out",
            bits=4,
            group=16,
            symmetric=True,
            format="compressed-tensors",
            text=str(text),
            length=32,
        )
    assert not list(tmp_path.iterdir())


def test_weights_alone_need_no_extra(missing, llama, tmp_path):
    missing("transformers")
    missing("compressed_tensors")
    grid = {"bits": 4, "group": 16, "symmetric": True}
    lw.compress(llama, tmp_path / "out", **grid, format="compressed-tensors", proof="none")
    assert (tmp_path / "out" / "model.safetensors").exists()
