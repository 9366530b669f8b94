"""A disk that is full, at the start and in the middle."""

import os
import subprocess
from pathlib import Path

import pytest
from cli import children
from cli.children import Fate

RTN = ("--bits", 4, "--group", 16)


def test_a_file_that_may_not_get_that_large(llama, tmp_path):
    log = tmp_path / "log"
    words = ("compress", llama, "-o", tmp_path / "out", *RTN, "--proof", "none", "--json")
    assert children.run(words, log, Fate(file_bytes=50_000)) == 2
    said = log.read_text()
    assert f"layerwise: {tmp_path / 'out'} needs" in said
    assert "Make room, or put -o on another disk." in said
    assert [file.name for file in tmp_path.iterdir()] == ["log"]


@pytest.fixture
def disk(tmp_path):
    """Mounts a disk of so many bytes."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        call = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(call, check=False, capture_output=True).returncode:
            pytest.skip("only root can mount a small disk")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small(disk, refuses, llama):
    folder = disk(1 << 16)
    command = ("compress", llama, "-o", folder / "out", *RTN, "--proof", "none")
    refuses(*command, says=(folder / "out", "GB free"), remedy="Make room")
    assert not list(folder.iterdir())


def test_a_disk_without_room_for_activations(disk, refuses, llama, text):
    """The shards fit, the activations that are kept between blocks do not: it is foreseen."""
    size = (llama / "model.safetensors").stat().st_size
    folder = disk(size + (1 << 16))
    windows = ("--calibration", text, "--samples", 8, "--length", 128, "--text-samples", 8)
    command = ("compress", llama, "-o", folder / "out", *RTN, "--method", "gptq", *windows)
    refuses(*command, says=(folder / "out", "GB free"), remedy="Make room")
    assert not list(folder.iterdir())
