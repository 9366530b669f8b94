"""Files are laid out as safetensors says, and appear whole or not at all."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from layerwise.core.errors import UserError
from layerwise.core.keeping.staging import Staging, arrange, stage
from layerwise.core.reading.checkpoint import DTYPES, INDEX, TensorInfo

WIDE = TensorInfo("wide", torch.float32, (5, 7))
HALF = TensorInfo("half", torch.bfloat16, (3,))
FLAGS = TensorInfo("flags", torch.bool, (3, 1))
COUNT = TensorInfo("count", torch.int64, ())
EMPTY = TensorInfo("empty", torch.float32, (0, 4))
EVERY = [FLAGS, HALF, WIDE, COUNT, EMPTY]


def filled(info: TensorInfo) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, info.shape, generator=generator).to(info.dtype)


def begun(out, infos=EVERY, *, identity="same", restart=False, **layout) -> Staging:
    return stage(out, arrange(infos, **layout), identity, restart=restart)


def finished(staging: Staging, infos=EVERY) -> None:
    for info in infos:
        staging.write(info.name, filled(info))
        staging.finish_step(info.name, {})
    staging.publish()


@pytest.mark.parametrize("shard_bytes", [1, 20, 150, 10_000])
def test_safetensors_reads_what_was_written(tmp_path, shard_bytes):
    finished(begun(tmp_path / "out", shard_bytes=shard_bytes))
    found = {
        k: v for f in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(f).items()
    }
    assert found.keys() == {info.name for info in EVERY}
    for info in EVERY:
        assert found[info.name].dtype == info.dtype
        assert torch.equal(found[info.name], filled(info))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype(tmp_path, dtype):
    info = TensorInfo("x", dtype, (2, 3))
    finished(begun(tmp_path / "out", [info]), [info])
    found = load_file(tmp_path / "out" / "model.safetensors")["x"]
    assert found.dtype == dtype
    assert torch.equal(found.float(), filled(info).float())


def test_every_tensor_is_aligned_to_its_entries():
    for slot in arrange(EVERY).slots.values():
        assert slot.offset % slot.info.dtype.itemsize == 0


def test_a_shard_holds_no_more_than_it_may_unless_one_tensor_is_larger():
    arrangement = arrange(EVERY, shard_bytes=20)
    held = dict.fromkeys(arrangement.headers, 0)
    for slot in arrangement.slots.values():
        held[slot.file] += slot.info.size
    assert all(size <= 20 or size == WIDE.size for size in held.values())
    assert sum(held.values()) == sum(info.size for info in EVERY)


def test_an_index_says_where_every_tensor_is(tmp_path):
    out = tmp_path / "out"
    staging = begun(out, shard_bytes=20)
    staging.add({})
    finished(staging)
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(info.size for info in EVERY)
    for name, file in index["weight_map"].items():
        with safe_open(out / file, framework="pt") as shard:
            assert name in shard.keys()  # noqa: SIM118
    assert set(index["weight_map"]) == {info.name for info in EVERY}


def test_rows_may_come_in_slices(tmp_path):
    staging = begun(tmp_path / "out", [WIDE])
    for start, stop in ((0, 2), (2, 3), (3, 5)):
        staging.write("wide", filled(WIDE)[start:stop], start)
    staging.publish()
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["wide"], filled(WIDE))


def test_nothing_of_the_work_is_left(tmp_path):
    staging = begun(tmp_path / "out")
    staging.finish_step("one", {}, {"state": torch.ones(3)})
    staging.add({"note.json": b"{}"})
    finished(staging)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"model.safetensors", "note.json"}


def test_a_stopped_run_is_taken_up(tmp_path):
    out = tmp_path / "out"
    staging = begun(out)
    staging.write("wide", filled(WIDE))
    staging.finish_step("first", {"rows": [1]}, {"state": torch.ones(3)})
    staging.write("half", filled(HALF))
    staging.close()
    staging = begun(out)
    assert staging.steps["first"]["facts"] == {"rows": [1]}
    states = staging.states()
    assert states is not None
    assert torch.equal(states["state"][:], torch.ones(3))
    with pytest.raises(KeyError), staging:
        raise KeyError
    assert out.with_name("out.partial").exists()
    with pytest.raises(UserError), begun(out):
        raise UserError("the data are wrong.", "Give others.")
    assert not list(tmp_path.iterdir())


def test_a_different_run_is_refused_until_restarted(tmp_path):
    out = tmp_path / "out"
    staging = begun(out)
    staging.finish_step("first", {})
    staging.close()
    with pytest.raises(UserError, match=r"out\.partial.*\n.*--restart"):
        begun(out, identity="other")
    # The refusal holds no lock.
    staging = begun(out, identity="other", restart=True)
    assert not staging.steps
    finished(staging)
    assert torch.equal(load_file(out / "model.safetensors")["wide"], filled(WIDE))


def test_steps_after_a_damaged_one_are_forgotten_for_good(tmp_path):
    out = tmp_path / "out"
    staging = begun(out)
    for info in EVERY[:3]:
        staging.write(info.name, filled(info))
        staging.finish_step(info.name, {})
    slot = staging.arrangement.slots["half"]
    staging.handles[slot.file].seek(slot.offset)
    staging.handles[slot.file].write(b"\xff")
    staging.close()
    for _ in range(2):
        staging = begun(out)
        assert list(staging.steps) == ["flags"]
        staging.close()
    finished(begun(out))
    assert torch.equal(load_file(out / "model.safetensors")["half"], filled(HALF))


def test_one_run_at_a_time(tmp_path):
    staging = begun(tmp_path / "out")
    with pytest.raises(UserError, match="another run is writing"):
        begun(tmp_path / "out")
    with pytest.raises(UserError, match="another run is writing"):
        begun(tmp_path / "out", restart=True)
    finished(staging)


def test_an_output_that_exists_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"exists already.*\n.*another -o"):
        begun(tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
