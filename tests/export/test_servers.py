"""A plan that a server would not load is refused before any work."""

import models
import pytest

import layerwise as lw
from layerwise import export
from layerwise.core.plan import LayerPlan, Plan, read_plan, to_yaml
from layerwise.export.servers import SERVERS, allowed, check_level, check_server, default_format
from layerwise.flow.wish import Wish


@pytest.mark.parametrize(
    ("wish", "problem"),
    [
        ({"bits": 3}, "vllm does not load 3 bits in compressed-tensors"),
        ({"bits": 4, "group": 16}, "groups of 16"),
        ({"bits": 4, "symmetric": False}, "zero points"),
        ({"bits": 8, "method": "fp8", "group": 32}, "groups of 32"),
        ({"bits": 4, "rank": 600}, "rank 600"),
        ({"bits": 4, "format": "layerwise"}, "vllm does not load the format layerwise"),
        ({"budget": "3.5bits", "allow": {"bits": [2.0, 4.0]}}, "2 bits"),
        ({"budget": "9bits", "allow": {"rank": [0.0, 600.0]}}, "rank 600"),
        ({"bits": 4, "format": "gptq", "method": "fp8"}, "float8|8 bits only"),
        ({"bits": 8, "method": "fp8", "server": "llama.cpp"}, "float8 codes"),
        ({"bits": 8, "group": 32, "activation": "int8"}, "inputs rounded to int8 beside 8 bits"),
        ({"bits": 4, "group": 32, "activation": "fp8"}, "codes of 4 bits in groups of 128"),
        ({"bits": 4, "activation": "int4"}, "rounded to int4 beside 4 bits"),
        ({"bits": 4, "server": "triton"}, "unknown server"),
        ({"bits": 4, "server": "transformers", "format": "gptq", "group": 16}, "groups of 16"),
    ],
)
def test_refuses_a_wish_before_any_work(wish, problem, llama, tmp_path):
    with pytest.raises(lw.UserError, match=problem):
        lw.compress(llama, tmp_path / "out", **{"server": "vllm", "proof": "none", **wish})
    assert not list(tmp_path.iterdir())


def test_the_wish_is_refused_before_the_model_is_looked_at():
    with pytest.raises(lw.UserError, match="2 bits"):
        Wish(bits=2, server="vllm").methods()


def test_defaults_are_what_the_server_loads(llama):
    plan = lw.plan(llama, bits=4, server="vllm")
    assert plan.format == "compressed-tensors"
    assert plan.server == "vllm"
    assert {(layer.group, layer.symmetric) for layer in plan.layers.values()} == {(32, True)}
    floats = lw.plan(llama, bits=8, method="fp8", server="vllm")
    assert {(layer.group, layer.symmetric) for layer in floats.layers.values()} == {(0, True)}
    for server, widths in (("vllm", [4, 8]), ("", [2, 3, 4, 8])):
        wish = Wish(budget="4bits", server=server)
        assert [level.bits for level in wish.combinations()] == widths
    assert Wish().format == "dense"


def test_groups_that_the_server_lacks_are_not_chosen(make_llama, tmp_path):
    """16 would divide all widths, but vLLM has no such groups."""
    models.make("llama", tmp_path / "model")
    plan = lw.plan(tmp_path / "model", bits=4, server="vllm")
    assert {layer.group for layer in plan.layers.values()} == {0}


@pytest.mark.parametrize(
    ("server", "format"), [("vllm", "compressed-tensors"), ("transformers", "gptq")]
)
def test_a_budget_keeps_the_server_s_rules(server, format, llama):
    allow = {"bits": [4.0, 8.0]}
    plan = lw.plan(llama, budget="6bits", allow=allow, server=server, format=format)
    given = {layer.bits for layer in plan.layers.values()}
    assert given == ({4, 8} if server == "vllm" else {4})
    assert plan.server == server


def test_an_edited_plan_is_checked_again(llama, tmp_path):
    opened = lw.open(llama)
    file = tmp_path / "plan.yaml"
    plan = lw.plan(llama, bits=4, server="vllm")
    text = to_yaml(plan, str(llama), opened.structure)
    assert "server: vllm" in text
    file.write_text(text.replace("down_proj: {bits: 4", "down_proj: {bits: 3", 1))
    assert read_plan(file, opened.structure).server == "vllm"
    with pytest.raises(lw.UserError, match=r"down_proj: vllm does not load 3 bits"):
        lw.compress(llama, tmp_path / "out", plan=file, proof="none")


def test_transformers_reads_one_grid_of_gptq_files(llama):
    found = lw.open(llama).structure
    layers = {
        name: LayerPlan(bits=8 if "down" in name else 4, group=32, symmetric=True)
        for name in found.layers
    }
    with pytest.raises(lw.UserError, match="one grid in all layers"):
        check_server(Plan(layers, "gptq", server="transformers"), found)
    check_server(Plan(layers, "gptq", server="vllm"), found)
    left = {name: LayerPlan() if layer.bits == 8 else layer for name, layer in layers.items()}
    check_server(Plan(left, "gptq", server="transformers"), found)


def test_vllm_wants_one_grid_in_the_experts_of_a_block(tmp_path):
    models.make("mixtral", tmp_path / "model")
    found = lw.open(tmp_path / "model").structure

    def plan(*eight: str) -> Plan:
        layers = {
            name: LayerPlan(bits=8 if any(e in name for e in eight) else 4, group=0, symmetric=True)
            for name in found.layers
        }
        return Plan(layers, "compressed-tensors", server="vllm")

    with pytest.raises(lw.UserError, match="the experts of a block"):
        check_server(plan("experts.1.w1"), found)
    check_server(plan("layers.0.block_sparse_moe"), found)


def test_no_server_refuses_nothing():
    check_level("", "dense", LayerPlan(bits=13, group=7))
    assert allowed("", "gptq").widths is None


@pytest.mark.parametrize("server", SERVERS)
def test_a_default_can_be_written_and_every_rule_names_its_source(server):
    assert default_format(server) in export.FORMATS
    for format, rules in SERVERS[server].items():
        assert format in export.FORMATS
        given = {name for name in ("widths", "groups", "rank") if getattr(rules, name) is not None}
        given |= {"symmetric"} if rules.symmetric else set()
        given |= {"alike"} if rules.alike != "fused" else set()
        assert given <= rules.sources.keys()
