"""A plan is a file that says the same however its lines are ordered, and does what it says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.plan import LayerPlan, Plan, check_plan, read_plan, to_yaml
from layerwise.core.reading.checkpoint import open_checkpoint
from layerwise.core.reading.structure import Structure, structure

DOWN = "model.layers.{}.mlp.down_proj"


@pytest.fixture(scope="session")
def found(llama) -> Structure:
    return structure(open_checkpoint(llama))


@pytest.fixture
def read(found, tmp_path):
    """Reads a plan from what its file holds."""

    def reading(content: object) -> Plan:
        file = tmp_path / "plan.yaml"
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return read_plan(file, found)

    return reading


PLANS = (
    LayerPlan(bits=4, group=16),
    LayerPlan(bits=3, group=0, symmetric=True, method="gptq", why="it: is, {so} # and 'more'"),
    LayerPlan(),
    LayerPlan(density=0.5, pruner="wanda"),
    LayerPlan(bits=2, group=16, density=0.25, rank=3, compensator="eora"),
)


def test_a_plan_reads_as_it_was_written(found, read):
    layers = {name: PLANS[n % len(PLANS)] for n, name in enumerate(found.layers)}
    options = {"quantize/gptq": {"damping": 0.1}}
    plan = Plan(layers, "dense", options, "3.5bits")
    assert read(to_yaml(plan, "some: model", found)) == plan


def test_what_is_left_alone_is_told(found):
    plan = Plan(dict.fromkeys(found.layers, LayerPlan(bits=4)))
    assert yaml.safe_load(to_yaml(plan, "m", found))["leave"] == dict(found.left)


def test_patterns_are_laid_over_the_layers_in_any_order(found, read):
    lines = {
        "model.layers.*.self_attn.*": {"bits": 4, "group": 16},
        "*.mlp.*_proj": {"bits": 3, "group": 16},
        DOWN.format(1): {"bits": 8, "group": 32},
        "*.o_proj": {"bits": 2},
        "model.layers.1.self_attn.o_proj": None,
        "model.layers.0.self_attn.o_proj": {},
    }
    # An exact name settles what two patterns claim.
    plan = read({"layers": lines})
    assert plan.layers[DOWN.format(0)] == LayerPlan(bits=3, group=16)
    assert plan.layers[DOWN.format(1)] == LayerPlan(bits=8, group=32)
    assert plan.layers["model.layers.1.self_attn.q_proj"].bits == 4
    assert plan.layers["model.layers.1.self_attn.o_proj"] == LayerPlan()
    turned = read(yaml.safe_dump({"layers": dict(reversed(lines.items()))}, sort_keys=False))
    assert turned == plan
    assert list(turned.layers) == list(plan.layers) == list(found.layers)


def test_experts_can_be_named_one_by_one_and_together(tmp_path):
    experts = "model.layers.0.mlp.experts.down_proj"
    tensors = {
        experts: torch.zeros(12, 4, 8),
        "model.layers.0.self_attn.o_proj.weight": torch.zeros(4, 8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    found = structure(open_checkpoint(tmp_path / "model.safetensors"))
    file = tmp_path / "plan.yaml"
    lines = {"*": {"bits": 4}, "*.down_proj[*]": {"bits": 2}, f"{experts}[1]": {"bits": 8}}
    file.write_text(yaml.safe_dump({"layers": lines}))
    with pytest.raises(UserError, match="claim"):
        read_plan(file, found)
    lines["*.o_proj"] = lines.pop("*")
    file.write_text(yaml.safe_dump({"layers": lines}))
    plan = read_plan(file, found)
    assert plan.layers[f"{experts}[1]"].bits == 8
    assert plan.layers[f"{experts}[11]"].bits == 2
    assert plan.layers["model.layers.0.self_attn.o_proj"].bits == 4


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("layers: [", "not YAML"),
        ("- layers", "no `layers:`"),
        ("layers: 4", "no `layers:`"),
        ("layer: {}\nlayers: {}", "unknown entries"),
        ("layers: {'*': {bits: 4}, '*': {bits: 3}}", "stands there twice"),
        ("layers: {'*': 4}", "not a mapping"),
        ("layers: {'*': {bits: four}}", "bits: 'four'"),
        ("layers: {'*': {bits: true}}", "bits: True"),
        ("layers: {'*': {bits: 4.5}}", "bits: 4.5"),
        ("layers: {'*': {group: '32'}}", "group: '32'"),
        ("layers: {'*': {group: }}", "group: None"),
        ("layers: {'*': {density: half}}", "density: 'half'"),
        ("layers: {'*': {symmetric: 1}}", "symmetric: 1"),
        ("layers: {'*': {bit: 4}}", "unknown fields"),
        ("layers: {1: {bits: 4}}", "no such layer"),
        ("layers: {'*': {}, lm_head: {bits: 4}}", "no such layer"),
        ("layers: {'*': {}, model.embed_tokens: {bits: 4}}", "left alone: embedding"),
        ("layers: {'model.layers.0.*': {bits: 4}}", "says nothing of the layer model.layers.1"),
        ("layers: {'MODEL.*': {bits: 4}}", "no such layer"),
        ("layers: {'*': {bits: 4}}\noptions: [a]", "`options` is not"),
        ("layers: {'*': {bits: 4}}\noptions: {quantize/rtn: 3}", "`options` is not"),
    ],
)
def test_what_is_no_plan_is_refused(read, content, says):
    with pytest.raises(UserError, match=r"plan\.yaml") as refused:
        read(content)
    assert says in refused.value.problem
    assert refused.value.remedy


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bits": 0}, "bits 0"),
        ({"bits": 17}, "bits 17"),
        ({"bits": 4, "group": 24}, "24 does not divide"),
        ({"bits": 4, "group": -1}, "group -1"),
        ({"density": 0.0}, "density 0.0"),
        ({"density": 1.5}, "density 1.5"),
        ({"rank": 99}, "rank 99"),
        ({"bits": 4, "group": 16, "method": "none"}, "quantize/none"),
        ({"bits": 4, "group": 16, "method": "awq"}, "nothing that feeds it"),
    ],
)
def test_what_cannot_be_done_is_refused(found, change, says):
    name = "model.layers.0.self_attn.o_proj"
    plain = dict.fromkeys(found.layers, LayerPlan(bits=4, group=16))
    check_plan(Plan(plain), found)
    with pytest.raises(UserError, match=says):
        check_plan(Plan(plain | {name: LayerPlan(**change)}), found)


def test_layers_that_servers_fuse_need_one_grid(found):
    plain = dict.fromkeys(found.layers, LayerPlan(bits=4, group=16))
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(UserError, match="different grids") as refused:
        check_plan(Plan(plain | {name: LayerPlan(bits=3, group=16)}), found)
    assert name in refused.value.problem


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Plan({}, options={"quantize/rtn": {"speed": 3}}), "has no option"),
        (Plan({}), "changes no layer"),
    ],
)
def test_a_plan_must_make_sense_as_a_whole(found, plan, says):
    even = LayerPlan() if says == "changes no layer" else LayerPlan(bits=4, group=16)
    with pytest.raises(UserError, match=says):
        check_plan(replace(plan, layers=dict.fromkeys(found.layers, even)), found)


@pytest.mark.parametrize(
    "wish",
    [
        {"bits": 4, "group": 16, "symmetric": True},
        {"budget": "9.5bits", "group": 16, "density": 0.5, "rank": 1},
        {"bits": 3, "group": 0, "method": "gptq", "options": {"quantize/gptq": {"damping": 0.1}}},
    ],
)
def test_a_plan_that_is_carried_out_does_what_its_wish_does(llama, found, text, tmp_path, wish):
    texts = {"calibration": text, "samples": 4, "length": 32}
    direct = lw.compress(llama, tmp_path / "direct", **wish, **texts, proof="none")
    plan = lw.plan(llama, **wish, **texts)
    file = Path(tmp_path / "plan.yaml")
    file.write_text(to_yaml(plan, str(llama), found))
    planned = lw.compress(llama, tmp_path / "planned", plan=file, **texts, proof="none")
    # Methods that need nothing do not look at the text again: their errors are of weights.
    told = {"why": "", "error": 0.0}
    rows = [{row.layer: replace(row, **told) for row in one.layers} for one in (direct, planned)]
    assert rows[0] == rows[1]
    one, other = (
        load_file(tmp_path / name / "model.safetensors") for name in ("direct", "planned")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "direct" / "plan.yaml").read_text() == file.read_text()
