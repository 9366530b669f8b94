"""A model without one block at a time, against the model of transformers with a block bypassed."""

import models
import pytest
import torch

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.running.ablation import LEFT_OUT, ablated, answered
from layerwise.core.running.evidence import UpdateCollector
from layerwise.core.running.runner import Runner

KINDS = ("llama", "gpt2", "gpt_neox", "phi", "gemma2", "opt", "qwen3_moe")


def _runner(kind, folder, **settings):
    model = models.make(kind, folder, **settings)
    opened = lw.open(folder)
    return model, Runner(opened.source, opened.structure)


def _blocks(model):
    lists = [one for one in model.modules() if isinstance(one, torch.nn.ModuleList)]
    return max(
        lists, key=lambda one: (type(one[0]).__name__.endswith(("Layer", "Block")), len(one))
    )


def _seen(model, ids, without=None, mask=None):
    """What each block adds to the stream, and the log-probabilities."""
    added = []

    def bypass(module, args, kwargs, answer, number):
        given = args[0] if args else kwargs["hidden_states"]
        plain = answer if isinstance(answer, torch.Tensor) else answer[0]
        if number == without:
            plain = torch.where(mask[:, None], given, plain)
        added.append(plain - given)
        return plain if isinstance(answer, torch.Tensor) else (plain, *answer[1:])

    hooks = [
        block.register_forward_hook(
            lambda *given, number=number: bypass(*given, number), with_kwargs=True
        )
        for number, block in enumerate(_blocks(model))
    ]
    with torch.no_grad():
        logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    return added, logits.log_softmax(dim=-1)


@pytest.mark.parametrize("word", list(LEFT_OUT))
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_block_is_left_out_as_if_its_tokens_passed_it_by(kind, word, tmp_path):
    changes = {"num_hidden_layers": 3} | ({"n_layer": 3} if kind == "gpt2" else {})
    model, runner = _runner(kind, tmp_path / "model", **changes)
    ids = models.inputs(kind)
    mask = LEFT_OUT[word](ids.shape[1])
    found = ablated(runner, ids, mask)
    added, original = _seen(model, ids)
    assert torch.cat(list(found.answers())).allclose(original, atol=1e-4)
    for number in range(3):
        changed, answers = _seen(model, ids, number, mask)
        assert torch.cat(list(found.answers(number))).allclose(answers, atol=1e-4)
        effect = found.effect(number)
        assert effect.shape == (2 - number, *ids.shape)
        for place, later in enumerate(range(number + 1, 3)):
            moved = (changed[later] - added[later]).norm(dim=-1) / added[later].norm(dim=-1)
            assert effect[place].allclose(moved, atol=1e-3)


def test_the_answers_can_be_read_again(tmp_path):
    model, runner = _runner("llama", tmp_path / "model")
    ids = models.inputs("llama")
    found = answered(runner, ids)
    first, again = torch.cat(list(found)), torch.cat(list(found))
    assert first.equal(again)
    assert first.allclose(_seen(model, ids)[1], atol=1e-4)


def test_who_never_reads_the_group_never_misses_the_block(tmp_path):
    _, runner = _runner("llama", tmp_path / "model")
    ids = models.inputs("llama")
    found = ablated(runner, ids, LEFT_OUT["frozen"](16))
    kept, last = (torch.cat(list(found.answers(without))) for without in (None, 1))
    assert kept[:, 8:].equal(last[:, 8:])
    assert not kept[:, 1:8].allclose(last[:, 1:8])


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_block_adds_is_found_in_all_kinds_of_models(kind, tmp_path):
    model, runner = _runner(kind, tmp_path / "model")
    ids = models.inputs(kind)
    added, _ = _seen(model, ids)
    hidden = runner.start(ids)
    for block, expected in zip(runner.blocks, added, strict=True):
        collector = UpdateCollector(block)
        after = torch.cat(list(runner.carry(block, hidden, {}, updates=collector)))
        updates = collector.evidence()["updates"]
        assert len(updates) == (1 if kind in ("phi", "gpt_neox") else 2)
        assert sum(updates).allclose(expected.flatten(0, 1), atol=1e-4)
        assert (hidden + sum(updates).view_as(hidden)).allclose(after, atol=1e-4)
        hidden = after


def test_a_block_whose_answer_is_no_sum_is_refused(tmp_path):
    _, runner = _runner("bert", tmp_path / "model")
    hidden = runner.start(models.inputs("bert"))
    block = runner.blocks[0]
    with pytest.raises(UserError, match="no residual stream"):
        list(runner.carry(block, hidden, {}, updates=UpdateCollector(block)))
