"""Blocks on disk: every budget gives the sum of a prefix of them, and nothing but that."""

import json
import math
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.packing import unpack_bits
from layerwise.core.reading.checkpoint import open_checkpoint
from layerwise.core.reading.text import windows
from layerwise.export.bitstack import ORDER, VERSION, BitStack, Packed

ASSETS = os.environ.get("LAYERWISE_ASSETS", "")
TEXT = torch.arange(4 * 32).remainder(256).reshape(4, 32)
BLOCKS = 4


def stacked(model, out, **changes):
    wish = {"bits": BLOCKS, "method": "bitstack", "format": "bitstack"}
    texts = {"calibration": "builtin", "samples": 4, "length": 32, "text": "builtin"}
    texts |= {"text_samples": 2, "noise_floor": False}
    return lw.compress(model, out, **wish | texts | changes)


@pytest.fixture(scope="module")
def files(llama, tmp_path_factory):
    """A model of four blocks a layer, compressed once."""
    out = tmp_path_factory.mktemp("stacks") / "out"
    report = stacked(llama, out)
    assert report.proof is not None
    return out


@pytest.fixture
def stack(files):
    return BitStack(open_checkpoint(files))


def weights(model, names):
    """The weights of some layers, packed or not."""
    return {name: model.get_submodule(name).weight.detach().clone() for name in names}


def same(ours, theirs):
    return all(ours[name].equal(theirs[name]) for name in theirs) and ours.keys() == theirs.keys()


def table(files):
    return json.loads((files / ORDER).read_text())


def test_every_block_is_a_group_of_tensors(files, stack):
    tensors = load_file(files / "bitstack.safetensors")
    for name, facts in stack.layers.items():
        rows, width = facts["shape"]
        for number in range(BLOCKS):
            group = f"{name}.blocks.{number}"
            assert tensors[f"{group}.signs"].shape == (-(-rows * width // 8),)
            assert tensors[f"{group}.left"].shape == (rows, 1)
            assert tensors[f"{group}.right"].shape == (1, width)
        assert facts["tensor"] not in tensors


def test_the_whole_is_what_the_method_made(files, llama, tmp_path):
    stacked(llama, tmp_path / "out", format="layerwise")
    ours, theirs = lw.load(files).state_dict(), lw.load(tmp_path / "out").state_dict()
    assert same(ours, theirs)


def test_at_a_budget_weights_are_sums_of_stored_blocks(files, stack):
    budget = table(files)["bytes"][9]
    model, tensors = lw.load(files, budget=f"{budget}B"), load_file(files / "bitstack.safetensors")
    blocks = stack.blocks_within(budget)
    assert sum(blocks.values()) == len(blocks) + 9
    for name, facts in stack.layers.items():
        rows, width = facts["shape"]
        total = torch.zeros(rows, width)
        for number in range(blocks[name]):
            group = f"{name}.blocks.{number}"
            bits = unpack_bits(tensors[f"{group}.signs"][None], rows * width)
            signs = 2.0 * bits.reshape(rows, width) - 1
            total += signs * (tensors[f"{group}.left"].float() @ tensors[f"{group}.right"].float())
        torch.testing.assert_close(model.get_submodule(name).weight.data, total)


def test_the_table_is_of_what_is_held_and_never_falls(files, stack):
    content = table(files)
    order, held = content["order"], content["bytes"]
    assert held == sorted(held)
    assert len(held) == len(order) + 1 == len(stack.layers) * (BLOCKS - 1) + 1
    infos = stack.source.tensors
    assert held[-1] == sum(info.size for info in infos.values())
    later = re.compile(r"\.blocks\.[1-9]\d*\.")
    assert held[0] == sum(info.size for name, info in infos.items() if not later.search(name))


def test_no_budget_is_passed_and_no_layer_is_two_blocks_ahead(files, stack):
    least, most = (table(files)["bytes"][end] for end in (0, -1))
    last = None
    for budget in range(least, most + 500, 97):
        blocks = stack.blocks_within(budget)
        held = stack.least + sum((n - 1) * stack.block_bytes(name) for name, n in blocks.items())
        assert held <= budget
        assert max(blocks.values()) - min(blocks.values()) <= 1
        assert last is None or all(blocks[name] >= last[name] for name in blocks)
        last = blocks
    assert set(last.values()) == {BLOCKS}


def test_a_stack_grows_and_shrinks_to_what_loading_gives(files, stack):
    held = table(files)["bytes"]
    made = lw.stack(files, f"{held[5]}B")
    for place in (5, 20, 0, len(held) - 1, 13, 12, 30):
        budget = held[place] + 1
        made.resize(budget)
        assert made.bytes == held[place] <= budget
        assert made.blocks == stack.blocks_within(budget)
        loaded = lw.load(files, budget=f"{budget}B")
        assert same(weights(made.model, stack.layers), weights(loaded, stack.layers))
        with torch.no_grad():
            torch.testing.assert_close(made.model(TEXT).logits, loaded(TEXT).logits)


def test_a_stack_holds_no_more_than_it_says(files, stack):
    """Blocks stay packed: what is in memory is what was counted."""
    made = lw.stack(files, f"{table(files)['bytes'][17]}B")
    packed = [module for module in made.model.modules() if isinstance(module, Packed)]
    assert len(packed) == len(stack.layers)
    blocks = sum(part.nbytes for one in packed for block in one.blocks for part in block.values())
    rest = {id(tensor): tensor.nbytes for tensor in made.model.parameters()}
    assert blocks + sum(rest.values()) == made.bytes


def test_a_stack_computes_in_the_dtype_asked_for(files, stack):
    made = lw.stack(files, f"{table(files)['bytes'][9]}B", dtype=torch.bfloat16)
    loaded = lw.load(files, budget=f"{table(files)['bytes'][9]}B", dtype=torch.bfloat16)
    assert same(weights(made.model, stack.layers), weights(loaded, stack.layers))
    with torch.no_grad():
        assert made.model(TEXT).logits.equal(loaded(TEXT).logits)


def test_a_budget_below_the_least_is_refused_and_changes_nothing(files, stack):
    least = table(files)["bytes"][0]
    made = lw.stack(files, "10MiB")
    before = weights(made.model, stack.layers)
    for act in (
        lambda: made.resize(least - 1),
        lambda: made.resize("1KiB"),
        lambda: lw.load(files, budget=f"{least - 1}B"),
        lambda: lw.stack(files, f"{least - 1}B"),
    ):
        with pytest.raises(UserError, match="no room for one block") as refused:
            act()
        assert f"{least}B" in str(refused.value)
    assert same(weights(made.model, stack.layers), before)
    assert lw.load(files, budget=f"{least}B") is not None


def test_a_budget_of_other_files_is_refused(llama, tmp_path):
    for act in (lw.load, lw.stack):
        with pytest.raises(UserError, match="one size only"):
            act(llama, budget="10MiB")
    lw.compress(llama, tmp_path / "out", bits=4, group=16, format="layerwise", proof="none")
    with pytest.raises(UserError, match="one size only"):
        lw.load(tmp_path / "out", budget="10MiB")
    with pytest.raises(UserError, match="not an amount of memory"):
        lw.load(llama, budget="much")


class Told:
    """A trial whose losses are known beforehand, by tensor; it keeps what was tried."""

    def __init__(self, losses, stack):
        self.losses, self.levels, self.seen = losses, {}, []
        self.sums = {
            facts["tensor"]: [stack.weight(name, blocks) for blocks in range(1, BLOCKS + 1)]
            for name, facts in stack.layers.items()
        }

    def put(self, tensor, value):
        self.levels[tensor] = [value.equal(one) for one in self.sums[tensor]].index(True) + 1

    def loss(self):
        self.seen.append(sorted(self.levels.values()))
        return self.losses[max(self.levels, key=self.levels.__getitem__)]


@pytest.mark.parametrize("spoilt", [None, 3])
def test_within_a_level_the_block_that_leaves_least_comes_first(stack, spoilt):
    names, tensors = list(stack.layers), [facts["tensor"] for facts in stack.layers.values()]
    losses = {tensor: (7 * at) % 11 + at / 100 for at, tensor in enumerate(tensors)}
    best = sorted(names, key=lambda name: losses[stack.layers[name]["tensor"]])
    if spoilt is not None:
        losses[tensors[spoilt]] = math.nan
        best.remove(names[spoilt])
        best.append(names[spoilt])
    trial = Told(losses, stack)
    assert json.loads(stack.finished(trial)[ORDER])["order"] == best * (BLOCKS - 1)
    # Each trial has every layer at t blocks, but for one at t + 1.
    each = len(names)
    levels = [level for level in range(1, BLOCKS) for _ in range(each)]
    assert trial.seen == [[level] * (each - 1) + [level + 1] for level in levels]


def test_without_a_trial_layers_come_as_they_lie(llama, tmp_path, stack):
    stacked(llama, tmp_path / "out", proof="none")
    assert table(tmp_path / "out")["order"] == list(stack.layers) * (BLOCKS - 1)


def test_a_written_order_is_that_of_the_model_s_losses(files, stack):
    ids = windows(stack.source, "builtin", samples=4, length=32).ids
    model = lw.load(files, budget=f"{table(files)['bytes'][0]}B")
    losses = {}
    with torch.no_grad():
        for name in stack.layers:
            weight = model.get_submodule(name).weight
            before = weight.clone()
            weight.copy_(stack.weight(name, 2))
            losses[name] = float(model(ids, labels=ids).loss)
            weight.copy_(before)
    order = table(files)["order"][: len(losses)]
    found = [losses[name] for name in order]
    assert found == pytest.approx(sorted(found), abs=1e-6)  # sums in another order


def test_layers_may_have_blocks_of_different_number(llama, tmp_path):
    report = stacked(
        llama,
        tmp_path / "out",
        bits=None,
        budget="5bits",
        allow={"bits": [1, 2, 4]},
        layer_windows=0,
    )
    assert report.proof is not None
    stack = BitStack(open_checkpoint(tmp_path / "out"))
    most = {name: facts["blocks"] for name, facts in stack.layers.items()}
    assert len(set(most.values())) > 1
    for budget in table(tmp_path / "out")["bytes"]:
        blocks = stack.blocks_within(budget)
        level = max(blocks.values())
        assert all(blocks[name] >= min(level - 1, most[name]) for name in blocks)


def test_a_layer_that_is_left_and_one_of_another_method(llama, tmp_path):
    left, dense = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"
    others = [name for name in lw.open(llama).structure.layers if name not in (left, dense)]
    plan = tmp_path / "plan.yaml"
    lines = [
        "format: bitstack",
        "layers:",
        f"  {left}: {{}}",
        f"  {dense}: {{bits: 4, group: 16, method: rtn, dense: true}}",
        *(f"  {name}: {{bits: 3, group: 0, method: bitstack}}" for name in others),
    ]
    plan.write_text("\n".join(lines) + "\n")
    report = lw.compress(
        llama, tmp_path / "out", plan=plan, calibration="builtin", samples=4, length=32,
        text="builtin", text_samples=2, noise_floor=False,
    )  # fmt: skip
    assert report.proof is not None
    made = lw.stack(tmp_path / "out", "10MiB")
    assert list(made.blocks) == others


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"method": "pvq", "bits": 3, "group": 16}, "codes of pvq"),
        ({"rank": 2}, "a low-rank correction"),
    ],
)
def test_what_it_cannot_hold_is_refused(llama, tmp_path, wish, says):
    with pytest.raises(UserError, match=says):
        stacked(llama, tmp_path / "out", **wish)
    assert not (tmp_path / "out").exists()


def test_transposed_layers_and_names_without_a_prefix(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=256,
        n_positions=64,
        n_embd=32,
        n_layer=1,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    stored = load_file(tmp_path / "gpt2" / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    save_file(bare, tmp_path / "gpt2" / "model.safetensors", {"format": "pt"})
    report = stacked(tmp_path / "gpt2", tmp_path / "out", bits=2)
    assert report.proof is not None
    budget = table(tmp_path / "out")["bytes"][2]
    made, loaded = (
        lw.stack(tmp_path / "out", f"{budget}B"),
        lw.load(tmp_path / "out", budget=f"{budget}B"),
    )
    with torch.no_grad():
        torch.testing.assert_close(made.model(TEXT).logits, loaded(TEXT).logits)


def test_a_model_in_memory(tmp_path):
    module = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8))
    stacked(module, tmp_path / "out", calibration=torch.randn(16, 24), text=None)
    state = BitStack(open_checkpoint(tmp_path / "out")).read()
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in module.state_dict().items()
    }


def test_a_later_version_and_a_lost_order_are_refused(llama, tmp_path):
    out = tmp_path / "out"
    stacked(llama, out, bits=2, proof="none")
    order = (out / ORDER).read_text()
    (out / ORDER).unlink()
    with pytest.raises(UserError, match=f"lacks its {ORDER}"):
        lw.load(out, budget="10MiB")
    (out / ORDER).write_text(json.dumps({"order": json.loads(order)["order"][1:]}))
    with pytest.raises(UserError, match="does not list the blocks"):
        lw.load(out, budget="10MiB")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["version"] = VERSION + 1
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"version {VERSION + 1}"):
        lw.load(out)


@pytest.mark.trained
def test_half_a_level_of_a_trained_model_helps_more_in_order_than_backwards(tmp_path):
    text = f"{ASSETS}/text/wikitext2"
    wish = {"bits": 3, "method": "bitstack", "format": "bitstack", "length": 64}
    texts = {"calibration": f"{text}/valid.txt", "text": f"{text}/test.txt", "text_samples": 32}
    lw.compress(f"{ASSETS}/models/bytes-wikitext", tmp_path / "out", **wish | texts, samples=32)
    stack = BitStack(open_checkpoint(tmp_path / "out"))
    ids = windows(stack.source, f"{text}/test.txt", samples=64, length=64).ids
    model = lw.load(tmp_path / "out")
    each = len(stack.layers)

    def loss(level, more):
        with torch.no_grad():
            for name in stack.layers:
                blocks = level + (name in more)
                model.get_submodule(name).weight.copy_(stack.weight(name, blocks))
            return float(model(ids, labels=ids).loss)

    for level in (1, 2):
        order = stack.order()[(level - 1) * each : level * each]
        first, last = order[: each // 2], order[-(each // 2) :]
        assert loss(level, first) < loss(level, last)
