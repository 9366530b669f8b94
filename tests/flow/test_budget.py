"""One budget over widths, densities and ranks; what is kept for the next one."""

import itertools
import json
from pathlib import Path

import pytest
import torch

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.keeping.cache import Cache
from layerwise.core.keeping.candidates import Candidates
from layerwise.core.plan import read_plan, to_yaml
from layerwise.flow import market as markets
from layerwise.flow.planning import make_plan
from layerwise.flow.preparing import Texts, check, prepare
from layerwise.flow.wish import Wish

ALLOW = {"bits": [2, 3, 4, 8], "density": [1.0, 0.75, 0.5], "rank": [0, 1, 4]}
TEXT = torch.arange(12 * 32).remainder(251).reshape(12, 32)
TEXTS = {"calibration": TEXT[:8], "samples": 8, "length": 32, "text": TEXT[8:], "text_samples": 4}
METHODS = {"method": "gptq", "pruner": "sparsegpt", "compensator": "eora", "group": 16}


class Stages:
    """Remembers which stages a run went through."""

    def __init__(self):
        self.names = []

    def stage(self, name, steps):
        self.names.append(name)

    def step(self, what):
        pass

    def tell(self, line):
        pass


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def planned(model, **wish):
    opened, wanted = lw.open(model), Wish(**wish)
    texts = Texts(TEXT[:8], 8, 32, TEXT[8:], 4)
    prepared = prepare(
        opened.source, opened.structure, wanted.methods(), texts, learning=wanted.learning
    )
    made = make_plan(prepared, wanted, Candidates(Cache(None), ""), Stages())
    return prepared, wanted.fitted(opened.structure), made


def chosen_costs(made):
    return {name: next(one for one in curve if one.chosen) for name, curve in made.curves.items()}


@pytest.mark.parametrize("sensitivity", ["error", "energy", "fisher"])
def test_no_other_mix_within_the_budget_costs_less(make_llama, tmp_path, sensitivity):
    """Against every mix there is, on a model of one block (four items)."""
    model = make_llama(tmp_path / "one", blocks=1)
    wish = {"allow": {"bits": [2, 4], "density": [1.0, 0.4], "rank": [0, 2]}, "group": 16}
    wish |= {"format": "layerwise", "sensitivity": sensitivity}
    for budget in ("3.8bits", "4.5bits", "5.6bits"):
        prepared, wanted, made = planned(model, budget=budget, **wish)
        market = markets.of_bytes(wanted, prepared)
        errors = [
            torch.tensor([[c.error for c in made.curves[x.name]] for x in item]).sum(0).tolist()
            for item in market.items
        ]
        sizes = [cost.tolist() for cost in market.costs]
        best = min(
            sum(row[level] for row, level in zip(errors, mix, strict=True))
            for mix in itertools.product(*(range(len(row)) for row in errors))
            if sum(row[n] for row, n in zip(sizes, mix, strict=True)) <= market.budget
        )
        got = sum(one.error for one in chosen_costs(made).values())
        assert got == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("format", ["layerwise", "compressed-tensors"])
def test_a_budget_is_never_exceeded_whatever_may_be_chosen(make_llama, tmp_path, format):
    model = make_llama(tmp_path / "model", dtype=torch.bfloat16, blocks=3)
    before = (model / "model.safetensors").stat().st_size
    allow = (
        {**ALLOW, "bits": [2, 3, 4, 8, None]} if format == "layerwise" else {"bits": [2, 4, None]}
    )
    wish = {"allow": allow, "group": 16, "format": format}
    for share in (66, 71.3, 80, 97):
        prepared, _, made = planned(model, budget=f"{share}%", **wish)
        size = check(prepared, made.plan).size
        assert size <= before * share / 100
        # The dearest step there is, of one item, was not affordable any more.
        assert size > before * (share - 12) / 100


def test_true_bytes_of_every_combination(llama):
    """A level's bytes are those of the tensors that the format would store."""
    prepared, _, made = planned(llama, budget="4bits", allow=ALLOW, format="layerwise", group=16)
    for one in chosen_costs(made).values():
        assert one.bits in ALLOW["bits"]
        assert one.density in ALLOW["density"]
        assert one.rank in ALLOW["rank"]
    total = sum(one.bytes for one in chosen_costs(made).values())
    fixed = check(prepared, made.plan)
    layers = {f"{name}." for name in prepared.found.layers}
    stored = sum(
        slot.info.size
        for name, slot in fixed.slots.items()
        if name.rpartition(".")[0] + "." in layers
    )
    assert abs(total - stored) <= len(layers)  # an item's bytes are shared out to its layers


def test_a_density_that_saves_nothing_is_left_out_and_said(llama, tmp_path):
    wish = {"budget": "4bits", "allow": {"bits": [2, 4], "density": [1.0, 0.5]}, "group": 16}
    _, _, made = planned(llama, **wish, format="compressed-tensors")
    assert {one.density for one in made.plan.layers.values()} == {1.0}
    assert any("density 0.5 makes no layer smaller" in note for note in made.notes)
    report = lw.compress(
        llama, tmp_path / "out", **wish, **TEXTS, format="compressed-tensors", cache=False
    )
    assert any("density 0.5 makes no layer smaller" in note for note in report.notes)


def test_ranks_that_a_layer_does_not_have_are_not_offered(llama):
    _, _, made = planned(
        llama, budget="6bits", allow={"rank": [0, 20]}, group=16, format="layerwise"
    )
    narrow = [name for name in made.curves if name.endswith("k_proj")]
    assert all(one.rank == 0 for name in narrow for one in made.curves[name])


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"allow": {"bits": [2, 4]}}, "no budget says how"),
        ({"budget": "4bits", "allow": {"depth": [1]}}, "'depth' cannot be allowed"),
        ({"budget": "4bits", "allow": {"bits": []}}, "at least one"),
        ({"budget": "4bits", "allow": {"bits": [2.5]}}, "whole numbers"),
        ({"budget": "4bits", "allow": {"rank": [0, 4]}, "rank": 2}, "as well"),
        ({"budget": "4bits", "max_kl": 0.1}, "at once"),
        ({"max_kl": -1.0}, "more than 0"),
        ({"budget": "4bits", "allow": {"rank": [0, 2]}, "allocate": "threshold"}, "ranks layers"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(wish, says):
    with pytest.raises(UserError) as refused:
        Wish(**wish).allocator()
    assert says in f"{refused.value.problem} {refused.value.remedy}"


def test_what_the_format_cannot_store_is_refused_with_the_formats_that_can(llama):
    with pytest.raises(UserError, match="cannot hold") as refused:
        planned(llama, budget="4bits", allow={"bits": [4, 12]}, format="compressed-tensors")
    assert "Formats that can hold 12 bits: dense, layerwise." in refused.value.remedy


@pytest.mark.parametrize("budget", ["1.5bits", "30%", "0.02MB"])
def test_a_budget_that_cannot_be_met_names_the_smallest_that_can(make_llama, tmp_path, budget):
    model = make_llama(tmp_path / "model", dtype=torch.bfloat16)
    wish = {"group": 16, "format": "layerwise"}
    with pytest.raises(UserError) as refused:
        planned(model, budget=budget, **wish)
    smallest = refused.value.remedy.partition("--budget ")[2].partition(" ")[0]
    _, _, made = planned(model, budget=smallest, **wish)
    assert {one.bits for one in made.plan.layers.values()} == {2}


def test_another_budget_touches_no_calibration(llama, own_cache, tmp_path):
    wish = {**METHODS, **TEXTS, "allow": ALLOW, "format": "layerwise"}
    first, second = Stages(), Stages()
    lw.compress(llama, tmp_path / "one", budget="4bits", **wish, progress=first)
    lw.compress(llama, tmp_path / "two", budget="5bits", **wish, progress=second)
    assert {"measure", "gradients"} <= set(first.names)
    assert not {"measure", "gradients"} & set(second.names)
    lw.compress(llama, tmp_path / "three", budget="5bits", **wish, cache=False)
    assert weights(tmp_path / "two") == weights(tmp_path / "three")


def weights(folder: Path) -> bytes:
    return (folder / "layerwise.safetensors").read_bytes()


def test_a_plan_edited_by_hand_is_stitched(llama, own_cache, tmp_path, monkeypatch):
    wish = {**METHODS, **TEXTS, "allow": {"bits": [2, 3, 4]}, "format": "layerwise"}
    lw.compress(llama, tmp_path / "one", budget="4bits", **wish, layer_windows=0)
    text = (tmp_path / "one" / "plan.yaml").read_text()
    edited = tmp_path / "plan.yaml"
    edited.write_text(text.replace("bits: 3", "bits: 2").replace("bits: 4", "bits: 3"))
    from layerwise.core.running import walk

    def never(*_, **__):
        raise AssertionError("calibration was touched")

    monkeypatch.setattr(walk, "gather", never)
    report = lw.compress(llama, tmp_path / "two", plan=edited, **TEXTS)
    assert {row.bits for row in report.layers} <= {2, 3}
    monkeypatch.undo()
    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path / "empty"))
    lw.compress(llama, tmp_path / "three", plan=edited, **TEXTS)
    assert weights(tmp_path / "two") == weights(tmp_path / "three")


def test_damaged_entries_are_found_and_made_again(llama, own_cache, tmp_path):
    wish = {**METHODS, **TEXTS, "budget": "4bits", "format": "layerwise", "layer_windows": 0}
    lw.compress(llama, tmp_path / "one", **wish)
    for file in own_cache.rglob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    report = lw.compress(llama, tmp_path / "two", **wish)
    assert any("damaged entries of the cache" in note for note in report.notes)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_a_cache_that_is_too_small_only_costs_time(llama, own_cache, tmp_path):
    wish = {**METHODS, **TEXTS, "budget": "4bits", "format": "layerwise", "layer_windows": 0}
    lw.compress(llama, tmp_path / "one", **wish, cache_bytes=20_000)
    held = sum(file.stat().st_size for file in own_cache.rglob("*.safetensors"))
    assert held <= 20_000
    lw.compress(llama, tmp_path / "two", **wish)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_scales_that_move_into_feeders(llama, own_cache, tmp_path):
    """AWQ's scales change the layers they move into: those are made anew, the rest is kept."""
    wish = {**METHODS, **TEXTS, "method": "awq", "budget": "4.2bits", "format": "layerwise"}
    del wish["pruner"], wish["compensator"]
    report = lw.compress(llama, tmp_path / "one", **wish)
    again = lw.compress(llama, tmp_path / "two", **wish)
    for one in (report, again):
        assert one.proof.largest_difference <= one.proof.allowed
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_the_smallest_model_of_a_quality(llama, tmp_path):
    wish = {"group": 16, "format": "layerwise", **TEXTS, "cache": False}
    report = lw.compress(llama, tmp_path / "out", max_kl=0.05, **wish)
    assert report.comparison.kl <= 0.05
    smaller = lw.compress(
        llama, tmp_path / "less", budget=f"{report.average_bits * 0.95}bits", **wish
    )
    assert smaller.comparison.kl > 0.05
    with pytest.raises(UserError, match="out of reach") as refused:
        lw.plan(llama, max_kl=1e-9, **wish)
    reachable = float(refused.value.remedy.partition("--max-kl ")[2].partition(" ")[0])
    made = lw.plan(llama, max_kl=reachable, **wish)
    assert made.budget == f"KL at most {reachable:g}"


@pytest.mark.parametrize("sensitivity", ["fisher", "kl"])
def test_what_was_foreseen_is_reported_beside_what_was_measured(llama, tmp_path, sensitivity):
    report = lw.compress(
        llama, tmp_path / "out", budget="5bits", group=16, sensitivity=sensitivity,
        format="layerwise", **TEXTS, cache=False,
    )  # fmt: skip
    told = report.prediction
    assert told.sensitivity == sensitivity
    assert told.measured == report.comparison.kl
    assert told.rank_correlation > 0.8
    assert told.predicted == pytest.approx(sum(row.predicted_kl for row in report.layers))
    assert all(row.measured_kl >= 0 for row in report.layers)
    assert all(sum(one.chosen for one in row.curve) == 1 for row in report.layers)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["prediction"]["rank_correlation"] == told.rank_correlation


def test_a_plan_says_what_its_methods_saw(llama, tmp_path):
    found = lw.open(llama).structure
    plan = lw.plan(llama, budget="4bits", group=16)
    file = tmp_path / "plan.yaml"
    file.write_text(to_yaml(plan, str(llama), found))
    assert read_plan(file, found).inputs == plan.inputs == "original"
    file.write_text(file.read_text().replace("inputs: original", "inputs: other"))
    with pytest.raises(UserError, match="inputs"):
        read_plan(file, found)
