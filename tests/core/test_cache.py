"""What is kept comes back whole or not at all."""

import os

import pytest
import torch

from layerwise.core.keeping.cache import Cache
from layerwise.core.keeping.candidates import Candidates, Losses
from layerwise.core.plan import LayerPlan
from layerwise.core.reading.checkpoint import open_source
from layerwise.core.reading.structure import structure
from layerwise.core.running.apply import transform

TENSORS = {"codes": torch.arange(12).reshape(3, 4), "scale": torch.ones(3, dtype=torch.bfloat16)}
PLANS = {
    "codes": LayerPlan(bits=3, group=16),
    "symmetric codes": LayerPlan(bits=5, group=0, symmetric=True),
    "wide codes": LayerPlan(bits=12, group=16),
    "survivors": LayerPlan(density=0.3),
    "coded survivors": LayerPlan(bits=4, group=16, density=0.55),
    "factors": LayerPlan(rank=3),
    "all": LayerPlan(bits=3, group=16, density=0.5, rank=2),
}


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "kept", 10**9)


@pytest.fixture
def layer(llama):
    source = open_source(llama)
    chosen = structure(source).layers["model.layers.0.mlp.down_proj"]
    return chosen, chosen.matrix(source.read(chosen.tensor)).contiguous()


def files(cache):
    return sorted(cache.folder.glob("*/*.safetensors"))


def test_what_is_kept_comes_back(cache):
    cache.put("ab12", TENSORS, {"notes": ["a"]})
    entry = cache.get("ab12")
    assert entry is not None
    assert entry.facts == {"notes": ["a"]}
    assert all(torch.equal(entry.tensors[name], tensor) for name, tensor in TENSORS.items())
    assert cache.get("ab13") is None
    assert not cache.notes


@pytest.mark.parametrize("place", [9, 60, -1])
def test_a_damaged_entry_is_found_and_removed(cache, place):
    cache.put("ab12", TENSORS, {"notes": ["a"]})
    (file,) = files(cache)
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)
    assert cache.get("ab12") is None
    assert cache.damaged == 1
    assert not files(cache)
    assert "damaged" in cache.notes[0]


def test_an_entry_that_was_cut_short_is_removed(cache):
    cache.put("ab12", TENSORS, {})
    (file,) = files(cache)
    file.write_bytes(file.read_bytes()[:40])
    assert cache.get("ab12") is None
    assert not files(cache)


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    cache = Cache(tmp_path, 10**9)
    for number in range(6):
        cache.put(f"0{number}", {"x": torch.zeros(1000)}, {})
    for age, file in enumerate(files(cache)):
        os.utime(file, ns=(age, age))
    assert cache.get("00") is not None  # now it is the youngest
    cache.limit = 5 * files(cache)[0].stat().st_size
    cache.put("99", {"x": torch.zeros(1000)}, {})
    left = {file.stem for file in files(cache)}
    assert {"00", "99"} <= left
    assert "01" not in left
    assert sum(file.stat().st_size for file in files(cache)) <= cache.limit


def test_a_cache_that_cannot_be_written_says_so_and_work_goes_on(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / "file", 10**9)
    cache.put("ab12", TENSORS, {})
    assert cache.get("ab12") is None
    assert "could not be written" in cache.notes[0]


def test_no_folder_keeps_nothing():
    cache = Cache(None)
    cache.put("ab12", TENSORS, {})
    assert cache.get("ab12") is None
    assert not cache.notes


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_candidate_is_what_the_methods_made(plan, layer, cache):
    candidates = Candidates(cache, "here")
    chosen, weight = layer
    assert candidates.find(chosen, plan, {}) is None
    (made,) = transform([chosen], [weight], {}, [plan], {})
    candidates.keep(made, {})
    candidates.keep_losses(chosen, Losses.of(made), {})
    found = candidates.find(chosen, plan, {})
    assert found is not None
    for name in ("weight", "base", "lost", "energy"):
        assert torch.equal(getattr(found, name), getattr(made, name)), name
    assert (found.kept is None) == (made.kept is None)
    assert found.notes == made.notes
    if made.kept is not None:
        assert torch.equal(found.kept, made.kept)
    if made.quantized is not None:
        for name in ("codes", "scale", "zero"):
            one, other = getattr(found.quantized, name), getattr(made.quantized, name)
            assert torch.equal(one, other)
            assert one.dtype == other.dtype
    assert Candidates(cache, "elsewhere").find(chosen, plan, {}) is None
    other = {id: {"an option": 1} for id, _ in plan.steps}
    assert candidates.find(chosen, plan, other) is None


def test_lower_ranks_are_parts_of_the_highest_that_was_kept(layer, cache):
    candidates = Candidates(cache, "here")
    chosen, weight = layer
    made = {}
    for rank in (8, 3):
        plan = LayerPlan(bits=3, group=16, rank=rank)
        (made[rank],) = transform([chosen], [weight], {}, [plan], {})
        candidates.keep_losses(chosen, Losses.of(made[rank]), {})
    candidates.keep(made[8], {})
    before = len(files(cache))
    candidates.keep(made[3], {})
    assert len(files(cache)) == before
    found = candidates.find(chosen, LayerPlan(bits=3, group=16, rank=3), {})
    assert found is not None
    torch.testing.assert_close(found.weight, made[3].weight, rtol=1e-4, atol=1e-5)
    assert candidates.find(chosen, LayerPlan(bits=3, group=16, rank=9), {}) is None
