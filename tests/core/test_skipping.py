"""Work that is left out of running models: what is computed instead, and what is counted."""

import dataclasses

import models
import pytest
import torch
from torch import nn

import layerwise as lw
from layerwise.core import catalogue
from layerwise.core.errors import UserError
from layerwise.core.running.skipping import found_in, skip_blocks, skip_tokens
from layerwise.core.running.tally import Tally
from layerwise.flow.sparsifying import contributions

IDS = models.inputs("llama")
TEXT = ["llama", "qwen3", "gpt2", "phi", "phi3", "gpt_neox", "mistral", "gemma", "opt"]


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture
def llama():
    return models.built("llama")


@pytest.fixture
def ids():
    return models.inputs("llama")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit", "bert"])
def test_all_inputs_kept_change_nothing(kind):
    model, seen = models.built(kind), models.inputs(kind)
    before = logits(model, seen)
    with lw.sparsify(model, "wina", density=1.0) as sparse:
        assert torch.equal(logits(model, seen), before)
        assert sparse.tally.kept == sparse.tally.offered > 0
        assert sparse.tally.skipped == 0


def test_a_layer_multiplies_the_largest_products(llama, ids):
    layer = llama.model.layers[1].mlp.down_proj
    seen = []
    handle = layer.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with lw.sparsify(llama, "wina", density=0.25, first=0.0):
        logits(llama, ids)
    handle.remove()
    given, answered = seen[0]
    # The layer's hook is given what it multiplied; so at most a quarter is not zero.
    assert int((given != 0).sum(dim=-1).max()) == 12
    assert torch.allclose(answered, given @ layer.weight.T, atol=1e-5)


def test_hooks_come_off(llama, ids):
    before = logits(llama, ids)
    sparse = lw.sparsify(llama, "teal", density=0.3)
    changed = logits(llama, ids)
    assert not torch.equal(changed, before)
    with sparse.dense():
        assert torch.equal(logits(llama, ids), before)
    assert torch.equal(logits(llama, ids), changed)
    sparse.remove()
    assert torch.equal(logits(llama, ids), before)


def test_the_first_tokens_skip_nothing(llama, ids):
    with lw.sparsify(llama, "teal", density=0.3, first=0.25):
        changed = logits(llama, ids)
    same = (changed - logits(llama, ids)).abs().amax(dim=(0, 2)) < 1e-5
    assert same.tolist() == [True] * 4 + [False] * 12


def test_what_is_skipped_is_counted(llama, ids):
    """Of 8 inputs kept of 32, and 12 of 48, of every product inside the blocks."""
    with lw.sparsify(llama, "teal", density=0.25, first=0.0) as sparse, sparse.tally.counting():
        logits(llama, ids)
    inside = [one for one in llama.model.layers.modules() if isinstance(one, nn.Linear)]
    products = sum(2 * one.weight.numel() * ids.numel() for one in inside)
    assert sparse.tally.skipped == products * 3 // 4
    dense = Tally()
    with dense.counting():
        logits(llama, ids)
    assert dense.flops == sparse.tally.flops
    heads = llama.lm_head.weight
    attention = 2 * 4 * len(ids) * 4 * 16 * 16 * 8
    rotation = dense.flops - products - 2 * heads.numel() * ids.numel() - attention
    # Beside those only angles of rotary embeddings are a product: 4 frequencies a token.
    assert 0 <= rotation <= 2 * 4 * ids.numel()


def test_attention_counts_as_its_products_do(ids):
    """Attention that torch counts, product by product, is counted as one fused call is."""
    fused, apart = Tally(), Tally()
    with fused.counting():
        logits(models.built("llama"), ids)
    with apart.counting():
        logits(models.built("llama", attn_implementation="eager"), ids)
    assert fused.flops == apart.flops


@pytest.mark.parametrize("kind", ["llama", "gemma", "phi", "gpt2"])
def test_inputs_may_be_turned_without_changing_the_model(kind):
    model, seen = models.built(kind), models.inputs(kind)
    before = logits(model, seen)
    with lw.sparsify(model, "wina", density=1.0, orthogonal=True):
        assert torch.allclose(logits(model, seen), before, atol=1e-4)


def test_turned_inputs_meet_orthogonal_columns(llama, ids):
    """Of what reads one input the weight of keys, or the gate: no other mask errs less there."""
    errors = {}
    layer, seen = llama.model.layers[0].mlp.gate_proj, []
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(out))
    for orthogonal in (False, True):
        seen.clear()
        logits(llama, ids)
        with lw.sparsify(
            llama, "wina", density=_only(llama, layer, 0.5), first=0.0, orthogonal=orthogonal
        ):
            logits(llama, ids)
        errors[orthogonal] = float((seen[1] - seen[0]).square().sum())
    handle.remove()
    assert errors[True] < errors[False]


def _only(model, layer, density):
    """That density for one layer, and all inputs for the others."""
    named = found_in(model).layers
    return {name: density if model.get_submodule(name) is layer else 1.0 for name in named}


def test_turning_is_paid_for_once_an_input(llama, ids):
    counts = {}
    for orthogonal in (False, True):
        with lw.sparsify(llama, "wina", density=1.0, orthogonal=orthogonal) as sparse:
            with sparse.tally.counting():
                logits(llama, ids)
            counts[orthogonal] = sparse.tally.needed
    # Two inputs a block are turned, each of 32 entries, for each token.
    assert counts[True] - counts[False] == 2 * 2 * 2 * 32 * 32 * ids.numel()


def test_a_density_for_each_layer(llama, ids):
    names = list(found_in(llama).layers)
    with lw.sparsify(llama, "teal", density=dict.fromkeys(names, 0.5)):
        alike = logits(llama, ids)
    with lw.sparsify(llama, "teal", density=0.5):
        assert torch.equal(logits(llama, ids), alike)
    with pytest.raises(UserError, match=r"lm_head"):
        lw.sparsify(llama, "teal", density={"lm_head": 0.5})


def test_an_allocator_shares_a_density_out(llama, ids):
    """Layers that lose more keep more: with as much left out of each block, the whole errs less."""
    before = logits(llama, ids).log_softmax(dim=-1)
    found = {}
    for allocate in (None, "uniform", "knapsack"):
        how = {} if allocate is None else {"allocate": allocate, "calibration": ids}
        with lw.sparsify(llama, "wina", density=0.5, first=0.0, **how) as sparse:
            after = logits(llama, ids).log_softmax(dim=-1)
            found[allocate] = float((before.exp() * (before - after)).sum())
            assert sparse.tally.kept <= 0.56 * sparse.tally.offered
    assert found["uniform"] == found[None]
    assert found["knapsack"] < found["uniform"]


def frozen_by_hand(model, ids, stays, group):
    """The definition, the slow way: everything is computed, and updates of the group are undone."""
    handles = []

    def undo(module, args, out):
        hidden = args[0]
        found = out if isinstance(out, torch.Tensor) else out[0]
        left = found.clone()
        left[:, group] = hidden[:, group]
        return left if isinstance(out, torch.Tensor) else (left, *out[1:])

    blocks = [name for name in found_in(model).blocks if name]
    for name, works in zip(blocks, stays, strict=True):
        if not works:
            handles.append(model.get_submodule(name).register_forward_hook(undo))
    found = logits(model, ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", TEXT)
@pytest.mark.parametrize("spans", [False, True])
def test_frozen_blocks_are_the_definition(kind, spans):
    """Not computing an update is computing and undoing it; the group may lie in several places."""
    model, seen = models.built(kind), models.inputs(kind)
    group = torch.arange(16) < 8
    if spans:
        group = torch.tensor([0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0], dtype=torch.bool)
    stays = torch.tensor([True, False])
    wanted = frozen_by_hand(model, seen, stays.tolist(), group)
    method = catalogue.get("sparsify/shortv")
    with skip_blocks(model, method, stays) as frozen:
        frozen.group = group
        found = logits(model, seen)
    assert torch.allclose(found, wanted, atol=2e-5)
    assert not torch.allclose(wanted, logits(model, seen), atol=1e-3)


def test_frozen_blocks_compute_less(llama, ids):
    """No query, output or MLP for 8 of 16 tokens, and half of the attention, in one block."""
    method = catalogue.get("sparsify/shortv")
    counts = []
    for stays in (torch.tensor([True, True]), torch.tensor([True, False])):
        with skip_blocks(llama, method, stays) as frozen, frozen.tally.counting():
            logits(llama, ids)
        counts.append(frozen.tally.flops)
    tokens = len(ids) * 8
    saved = 2 * tokens * (2 * 32 * 32 + 3 * 32 * 48) + 4 * tokens * 16 * 32
    assert counts[0] - counts[1] == saved


def test_a_group_of_nobody_changes_nothing(llama, ids):
    before = logits(llama, ids)
    method = catalogue.get("sparsify/shortv")
    for stays, group in (([False, False], 0.0), ([True, True], 0.5)):
        with skip_blocks(llama, method, torch.tensor(stays)) as frozen:
            frozen.group = group
            assert torch.equal(logits(llama, ids), before)


def test_the_last_block_contributes_nothing_to_tokens_that_nothing_reads(llama, ids):
    method = catalogue.get("sparsify/shortv")
    scores = contributions(llama, method, ids, 0.5)
    assert scores[1] == 0
    assert scores[0] > 0


def test_contributions_are_the_definition(llama, ids):
    method = catalogue.get("sparsify/shortv")
    group = torch.arange(16) < 8
    scores = contributions(llama, method, ids, 0.5)
    frozen = frozen_by_hand(llama, ids, [False, True], group)[:, -1].double().softmax(dim=-1)
    before = logits(llama, ids)[:, -1].double().softmax(dim=-1)
    wanted = (frozen * (frozen.log() - before.log())).sum(dim=1).mean()
    assert float(scores[0]) == pytest.approx(float(wanted), rel=1e-3)


def test_generate_freezes_the_prompt_alone(llama, ids):
    """With every token of the prompt but the last frozen, the cache still holds all of them."""
    method = catalogue.get("sparsify/shortv")
    told = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    whole = ids[:1]
    group = torch.arange(16) < 8
    with skip_blocks(llama, method, torch.tensor([True, False])) as frozen:
        frozen.group = group
        made = llama.generate(whole, **told)
        # Without a cache, the slow way: the group is the same eight positions each time.
        grown = whole
        for _ in range(5):
            frozen.group = torch.arange(grown.shape[1]) < 8
            grown = torch.cat([grown, logits(llama, grown)[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(made, grown)


def test_padded_texts_freeze_as_they_do_alone(llama, ids):
    method = catalogue.get("sparsify/shortv")
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids[:1]], dim=1)
    mask = torch.cat([torch.zeros(1, 4), torch.ones(1, 16)], dim=1).long()
    with skip_blocks(llama, method, torch.tensor([False, True])) as frozen, torch.no_grad():
        frozen.group = torch.arange(16) < 8
        alone = llama(ids[:1]).logits
        frozen.group = torch.arange(20) < 12
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        beside = llama(padded, attention_mask=mask, position_ids=places).logits[:, 4:]
    assert torch.allclose(alone[:, 8:], beside[:, 8:], atol=1e-4)


def test_tokens_leave_after_a_block():
    model, pictures = vit(), torch.randn(3, 3, 16, 16)
    seen = []
    for block in model.vit.layers:
        block.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    before = logits(model, pictures)
    for method in ("zero_tprune", "attended"):
        seen.clear()
        sparse = lw.sparsify(model, method, density=0.5, after=(0, 2))
        with sparse, sparse.tally.counting():
            changed = logits(model, pictures)
        assert seen == [8, 8, 4, 4]
        assert changed.shape == before.shape
        assert not torch.equal(changed, before)
    dense = Tally()
    with dense.counting():
        assert torch.equal(logits(model, pictures), before)
    assert sparse.tally.flops < 0.7 * dense.flops


def test_all_tokens_kept_change_nothing():
    model, pictures = vit(), torch.randn(2, 3, 16, 16)
    before = logits(model, pictures)
    with lw.sparsify(model, "zero_tprune", density=1.0, after=(0, 1, 2, 3)):
        assert torch.allclose(logits(model, pictures), before, atol=1e-5)


def test_the_attention_that_is_shown_is_the_model_s():
    model, pictures = vit(), torch.randn(2, 3, 16, 16)
    shown = []
    method = catalogue.get("sparsify/attended")

    def keep(attentions, *, density):
        shown.append(attentions)
        return method.run(attentions, density=density)

    with skip_tokens(model, dataclasses.replace(method, run=keep), 1.0, {}, after=(1,)):
        logits(model, pictures)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = model(pictures, output_attentions=True).attentions[1]
    assert torch.allclose(shown[0], wanted, atol=1e-5)


def vit():
    return models.built("vit", image_size=16, patch_size=4, num_hidden_layers=4)


@pytest.mark.parametrize(
    ("kind", "method", "how", "says"),
    [
        ("llama", "wina", {"density": 0.0}, "outside"),
        ("llama", "wina", {"density": float("nan")}, "outside"),
        ("llama", "shortv", {"density": 1.5, "calibration": IDS}, "outside"),
        ("llama", "wina", {"density": 0.5, "first": 1.0}, "first 1.0"),
        ("llama", "wina", {"density": 0.5, "recent": 4}, "recent says nothing"),
        ("llama", "think", {"density": 0.5, "orthogonal": True}, "orthogonal says nothing"),
        ("llama", "think", {"density": 0.5, "recent": 0}, "0 recent"),
        ("llama", "think", {"density": {}, "recent": 4}, "one density"),
        ("llama", "shortv", {"density": 0.5}, "contribute"),
        ("llama", "wyna", {"density": 0.5}, "no method"),
        ("llama", "wina", {"density": 0.5, "colour": 1}, "colour"),
        ("llama", "wina", {"density": 0.5, "allocate": "knapsack"}, "calibration text"),
        ("llama", "wina", {"density": 0.5, "allocate": "lamp", "calibration": IDS}, "lamp reads"),
        ("llama", "wina", {"density": 0.5, "options": {"steps": 1}}, "no option steps"),
        ("vit", "zero_tprune", {"density": 0.5, "after": (9,)}, "no block 9"),
        ("vit", "think", {"density": 0.5}, "queries cannot be seen"),
    ],
)
def test_refuses_what_does_not_fit(kind, method, how, says):
    model, seen = models.built(kind), models.inputs(kind)

    def run():
        with lw.sparsify(model, method, **how):
            logits(model, seen)

    with pytest.raises(UserError, match=says):
        run()


def test_refuses_tokens_that_are_masked(llama, ids):
    sparse = lw.sparsify(llama, "zero_tprune", density=0.5, after=(0,))
    with sparse, pytest.raises(UserError, match="without a mask"):
        logits(llama, ids)


def test_refuses_a_group_of_another_length(llama, ids):
    method = catalogue.get("sparsify/shortv")
    with skip_blocks(llama, method, torch.tensor([False, True])) as frozen:
        frozen.group = torch.ones(4).bool()
        with pytest.raises(UserError, match="16"):
            logits(llama, ids)
