"""A model without some units is the model with zeros for them, and transformers loads it."""

import json

import models
import pytest
import torch
import transformers
from safetensors.torch import save_file

from layerwise.core.errors import UserError
from layerwise.core.reading.checkpoint import open_checkpoint
from layerwise.core.reading.structure import structure
from layerwise.core.results import Narrowed
from layerwise.core.rewriting.narrowing import (
    blocks_dropped,
    by_seam,
    joints,
    narrowed,
    own_widths,
    shared_widths,
    spendable,
)
from layerwise.core.rewriting.rewriting import Rewritten
from layerwise.core.running.evidence import Moments
from layerwise.core.running.runner import Runner

KINDS = [
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text", "phi3"),
    *("phi", "gpt2", "gpt_neox", "opt", "bert", "vit", "mixtral", "qwen2_moe"),
]
BIASED = {"llama", "smollm3", "phi", "gpt2", "gpt_neox", "opt", "bert", "vit"}


def answer(source, ids):
    runner = Runner(source, structure(source))
    hidden = runner.start(ids)
    for block in runner.blocks:
        hidden = runner.forward(block, hidden, {})
    return torch.cat([*runner.logits(hidden, ids, {})])


def same(first, second):
    return float((first - second).abs().max()) <= 1e-4 * float(first.abs().max())


def opened(kind, folder, **settings):
    models.make(kind, folder, **settings)
    source = open_checkpoint(folder)
    found = structure(source)
    return source, found, joints(source, found)


def cuts_of(all, *, bias=True):
    """Half of the units of each joint, another half in each, with something in their place."""
    draw = torch.Generator().manual_seed(1)
    made = {}
    for joint in all:
        kept = torch.zeros(joint.units, dtype=torch.bool)
        kept[torch.randperm(joint.units, generator=draw)[: max(1, joint.units // 2)]] = True
        lost = torch.randn(joint.reader.rows, generator=draw) * bias
        made[joint.reader.name] = Narrowed(kept, kept.float(), lost)
    return made


def cut(kind, folder, *, bias=True):
    source, found, all = opened(kind, folder)
    cuts = cuts_of(all, bias=bias)
    return source, [
        narrowed(source, found, all, cuts, zeroed=zeroed, told="", notes=())
        for zeroed in (False, True)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_units_that_are_gone_are_units_of_zeros(kind, tmp_path):
    source, (taken, zeroed) = cut(kind, tmp_path)
    ids = models.inputs(kind)
    assert same(answer(taken, ids), answer(zeroed, ids))
    assert not same(answer(source, ids), answer(zeroed, ids))
    count = [sum(i.count for i in one.tensors.values()) for one in (source, taken)]
    assert count[1] < 0.9 * count[0]
    lost = any("has no place for a bias" in note for note in taken.notes)
    assert lost == (kind not in BIASED)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "mixtral"])
def test_transformers_loads_what_is_left(kind, tmp_path):
    _, (taken, _) = cut(kind, tmp_path / "whole")
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(taken.config)))
    tensors = {name: taken.read(name) for name in taken.tensors}
    assert all(tuple(one.shape) == taken.tensors[name].shape for name, one in tensors.items())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = models.inputs(kind)
    with torch.no_grad():
        assert same(answer(taken, ids), model(ids).logits)


def test_rows_are_read_in_slices(tmp_path):
    _, (taken, _) = cut("llama", tmp_path)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.o_proj.bias"):
        whole = taken.read(name)
        assert torch.equal(torch.cat([taken.read(name, 0, 5), taken.read(name, 5)]), whole)


def test_the_configuration_says_the_new_widths(tmp_path):
    _, (taken, zeroed) = cut("llama", tmp_path)
    settings = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 24,
        "attention_bias": True,
        "mlp_bias": True,
    }
    assert taken.settings == settings
    assert zeroed.settings == {"attention_bias": True, "mlp_bias": True}


def test_no_bias_is_added_where_nothing_stands_in(tmp_path):
    _, (taken, _) = cut("llama", tmp_path, bias=False)
    assert not [name for name in taken.tensors if name.endswith("bias")]
    assert "mlp_bias" not in taken.settings


def scores_of(all):
    draw = torch.Generator().manual_seed(3)
    return {joint.reader.name: torch.randn(joint.units, generator=draw) for joint in all}


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "qwen2_moe"])
def test_widths_keep_to_what_there_is_to_spend(kind, tmp_path):
    source, found, all = opened(kind, tmp_path)
    scores, spent = scores_of(all), 0
    for keep in (0.95, 0.8, 0.6):
        budget = spendable(all, found, keep)
        shared = shared_widths(source, all, scores, budget)[0]
        for widths in (shared, own_widths(all, scores, budget)[0]):
            spent = sum(joint.cost * widths[joint.reader.name] for joint in all)
            assert 0 < spent <= budget
            assert all_within(all, widths)
        for members in by_seam(all).values():
            assert len({shared[joint.reader.name] for joint in members}) == 1
    assert spent > 0.8 * budget


def all_within(all, widths):
    return all and not [j for j in all if not 1 <= widths[j.reader.name] <= j.units]


def test_own_widths_are_a_threshold_over_all(tmp_path):
    _, found, all = opened("qwen3", tmp_path)
    scores = scores_of(all)
    budget = spendable(all, found, 0.7)
    widths, _ = own_widths(all, scores, budget)
    kept = {n: scores[n].sort(descending=True).values[: widths[n]] for n in widths}
    gone = {n: scores[n].sort(descending=True).values[widths[n] :] for n in widths}
    lowest = min(float(one[1:].min()) for one in kept.values() if len(one) > 1)
    assert lowest >= max(float(one.max()) for one in gone.values() if len(one))
    assert len(set(widths.values())) > 2


def test_a_joint_without_any_high_score_keeps_one_unit(tmp_path):
    _, found, all = opened("llama", tmp_path)
    scores = scores_of(all)
    name = all[0].reader.name
    scores[name] -= 100
    widths, notes = own_widths(all, scores, spendable(all, found, 0.5))
    assert widths[name] == 1
    assert name in notes[0]


def test_heads_of_a_llama_divide_its_width(tmp_path):
    settings = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}
    source, found, all = opened("llama", tmp_path, **settings)
    heads = [joint for joint in all if joint.seam.heads]
    told = set()
    for lowered, keep in ((0, 0.98), (1, 0.8), (6, 0.8)):  # of 8: so many are much lower
        budget = spendable(all, found, keep)
        scores = scores_of(all)
        for joint in heads:
            scores[joint.reader.name] = torch.full((8,), 50.0)
            scores[joint.reader.name][:lowered] = -50.0
        free = [own_widths(all, scores, budget)[0][joint.reader.name] for joint in heads]
        wanted = sum(free) / len(free)
        widths, notes = shared_widths(source, all, scores, budget)
        found_width = widths[heads[0].reader.name]
        assert found_width == min((1, 2, 4, 8), key=lambda n: abs(n - wanted))
        assert bool(notes) == (abs(found_width - wanted) >= 0.5)
        told.add(bool(notes))
    assert told == {True, False}


def test_what_would_leave_nothing_is_refused(tmp_path):
    _, found, all = opened("llama", tmp_path)
    for keep in (0.0, -1.0, 1.5, 0.001, float("nan")):
        with pytest.raises(UserError, match="keep"):
            spendable(all, found, keep)


def test_a_model_of_an_unknown_kind_is_refused(tmp_path):
    models.make("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "other"}))
    source = open_checkpoint(tmp_path)
    with pytest.raises(UserError, match="not known where units"):
        joints(source, structure(source))


@pytest.mark.parametrize(
    ("kind", "gone"),
    [("llama", [0]), ("llama", [2]), ("gemma3_text", [1]), ("gemma3_text", [0, 2]), ("gpt2", [1])],
)
def test_blocks_that_are_gone_pass_their_input_on(kind, gone, tmp_path):
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    depth = {"n_layer": 3} if kind == "gpt2" else {}
    depth |= {"num_hidden_layers": 3}
    kinds = {"layer_types": types} if kind == "gemma3_text" else {}
    model = models.make(kind, tmp_path, **depth, **kinds)
    source = open_checkpoint(tmp_path)
    found = structure(source)
    scores = {block: float(n not in gone) for n, block in enumerate(found.blocks)}
    smaller = blocks_dropped(source, found, scores, len(gone), model.config.to_dict())
    ids = models.inputs(kind)
    runner = Runner(source, found)
    hidden = runner.start(ids)
    for number, block in enumerate(runner.blocks):
        hidden = hidden if number in gone else runner.forward(block, hidden, {})
    wanted = torch.cat([*runner.logits(hidden, ids, {})])
    assert same(answer(smaller, ids), wanted)
    assert smaller.config[next(iter(depth))] == 3 - len(gone)
    if kinds:
        left = [one for n, one in enumerate(types) if n not in gone]
        assert smaller.config["layer_types"] == left


def test_the_original_is_carried_through_blocks_that_went(tmp_path):
    model = models.make("llama", tmp_path, num_hidden_layers=4)
    source = open_checkpoint(tmp_path)
    found = structure(source)
    scores = {block: float(n in (1, 2)) for n, block in enumerate(found.blocks)}
    smaller = blocks_dropped(source, found, scores, 2, model.config.to_dict())
    runner = Runner(smaller, structure(smaller))
    assert [runner.originals(block) for block in runner.blocks] == [
        ["model.layers.0", "model.layers.1"],
        ["model.layers.2", "model.layers.3"],
    ]


def test_a_model_keeps_a_block(tmp_path):
    model = models.make("llama", tmp_path)
    source = open_checkpoint(tmp_path)
    found = structure(source)
    scores = dict.fromkeys(found.blocks, 0.0)
    for count in (0, -1, 2, 5):
        with pytest.raises(UserError, match="are to go"):
            blocks_dropped(source, found, scores, count, model.config.to_dict())


def test_blocks_whose_nature_hangs_on_their_number_stay(tmp_path):
    model = models.make("qwen2_moe", tmp_path)
    source = open_checkpoint(tmp_path)
    found = structure(source)
    described = {**model.config.to_dict(), "mlp_only_layers": [1]}
    with pytest.raises(UserError, match="mlp_only_layers"):
        blocks_dropped(source, found, dict.fromkeys(found.blocks, 0.0), 1, described)


def test_moments_are_those_of_the_definition():
    draw = torch.Generator().manual_seed(0)
    inputs = 1e3 + torch.randn(300, 5, generator=draw)
    inputs[:, 2] = 7e7 / 3
    seen = Moments(5)
    for part in inputs.split(64):
        seen.see(part)
    seen.see(inputs[:0])
    assert torch.allclose(seen.mean, inputs.double().mean(dim=0).float())
    wanted = inputs.double().var(dim=0, correction=0).float()
    assert torch.allclose(seen.variance, wanted, rtol=1e-4)
    assert seen.variance[2] == 0
    assert not Moments(3).variance.any()


def test_a_chain_of_rewritings_has_one_original(tmp_path):
    source, (taken, _) = cut("llama", tmp_path)
    again = Rewritten(taken, {}, (), {"tie_word_embeddings": True}, "x", ["later"])
    assert again.config["intermediate_size"] == 24
    assert again.all_settings == {**taken.settings, "tie_word_embeddings": True}
    assert Runner(again, structure(again)).original.source is source
