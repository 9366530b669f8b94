"""Figures on a text: by their definitions, with their errors, and beside the noise floor."""

import hashlib
import math

import models
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.reading.checkpoint import open_checkpoint
from layerwise.core.reading.structure import structure
from layerwise.core.reading.text import Windows, windows
from layerwise.core.running.runner import Runner
from layerwise.evaluate.text import compare

READ = {"samples": 6, "length": 32}


def answered(*, seed: int, windows: int = 5, length: int = 7, vocabulary: int = 11):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(windows, length, vocabulary, generator=generator)


def read(count: int = 5, length: int = 7) -> Windows:
    ids = torch.randint(11, (count, length), generator=torch.Generator().manual_seed(9))
    return Windows(ids, "made up", "none")


def by_window(logits, before, ids):
    """Cross-entropy, the original's, KL and agreement of each window, token by token."""
    rows = []
    for window in range(len(ids)):
        sums = [0.0] * 4
        for place in range(ids.shape[1] - 1):
            new, old = (one[window, place].double().softmax(0) for one in (logits, before))
            successor = int(ids[window, place + 1])
            sums[0] -= math.log(new[successor])
            sums[1] -= math.log(old[successor])
            sums[2] += float((old * (old.log() - new.log())).sum())
            sums[3] += float(new.argmax() == old.argmax())
        rows.append([value / (ids.shape[1] - 1) for value in sums])
    return torch.tensor(rows, dtype=torch.float64)


def test_every_figure_and_its_error_by_definition():
    seen, after, before = read(), answered(seed=1), answered(seed=2)
    found = compare(seen, [after.split(2)], before.split(2))[0]
    rows = by_window(after, before, seen.ids)
    means = rows.mean(0).tolist()
    deviations = [
        (sum((x - m) ** 2 for x in c.tolist()) / 4) ** 0.5
        for c, m in zip(rows.T, means, strict=True)
    ]
    errors = [deviation / 5**0.5 for deviation in deviations]
    close = {"rel": 1e-5}
    assert found.perplexity == pytest.approx(math.exp(means[0]), **close)
    assert found.perplexity_before == pytest.approx(math.exp(means[1]), **close)
    assert found.kl == pytest.approx(means[2], **close)
    assert found.top1 == pytest.approx(means[3], **close)
    assert found.perplexity_error == pytest.approx(math.exp(means[0]) * errors[0], **close)
    assert found.perplexity_before_error == pytest.approx(math.exp(means[1]) * errors[1], **close)
    assert found.kl_error == pytest.approx(errors[2], **close)
    assert found.top1_error == pytest.approx(errors[3], **close)
    added = rows[:, 0] - rows[:, 1]
    assert found.loss_added == pytest.approx(float(added.mean()), **close)
    assert found.loss_added_error == pytest.approx(float(added.std()) / 5**0.5, **close)
    assert (found.windows, found.length, found.tokens) == (5, 7, 30)


def test_several_results_beside_one_original_are_as_each_alone():
    seen, before = read(), answered(seed=3)
    results = [answered(seed=4), answered(seed=5)]
    together = compare(seen, [one.split(2) for one in results], before.split(2))
    assert together == [compare(seen, [one.split(2)], before.split(2))[0] for one in results]


def test_a_single_window_has_no_error():
    found = compare(read(1), [[answered(seed=1, windows=1)]], [answered(seed=2, windows=1)])[0]
    assert found.kl is not None
    assert found.kl_error is None
    assert found.perplexity_error is None
    assert found.loss_added_error is None


def test_an_error_tells_draws_apart():
    """Over many draws the mean lands within two standard errors about 95 times in 100."""
    landed = 0
    ids = torch.randint(4, (4000, 9), generator=torch.Generator().manual_seed(0))
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0]).expand(4000, 9, 4)
    truth = math.log(sum(math.exp(x) for x in (0.0, 1.0, -1.0, 2.0))) - 0.5
    for part, given in zip(ids.split(40), logits.split(40), strict=True):
        found = compare(Windows(part, "", ""), [[given]], None)[0]
        error = found.perplexity_error / found.perplexity
        landed += abs(math.log(found.perplexity) - truth) < 2 * error
    assert 88 <= landed <= 100


def test_what_was_read_is_stated(llama, text):
    seen = lw.evaluate(llama, text=text, **READ).text
    ids = windows(open_checkpoint(llama), text, **READ).ids
    expected = hashlib.sha256(b"torch.int64 (6, 32)" + ids.numpy().tobytes()).hexdigest()
    assert seen.digest == expected
    assert (seen.windows, seen.length, seen.tokens, seen.text) == (6, 32, 6 * 31, str(text))
    assert seen.special == "none: a token is a byte"
    other = lw.evaluate(llama, text=["another text" * 40], **READ).text
    assert other.digest != seen.digest
    assert lw.evaluate(llama, text=ids, **READ).text.digest == seen.digest
    assert lw.evaluate(llama, text=ids, **READ).text.special == "given as token ids"


def test_special_tokens_are_named(make_llama, tmp_path):
    model = make_llama(tmp_path / "model", vocab_size=256)
    words = {"<s>": 0, "a": 1, "b": 2, " ": 3}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(model / "tokenizer.json"))
    seen = lw.evaluate(model, text=["ab ba " * 30] * 3, **READ).text
    assert seen.special == "<s> with each document, as the tokenizer adds it"


# The noise floor

FAMILIES = ("llama", "gemma2", "gpt2", "gpt_neox", "opt", "phi3", "qwen3_moe", "bert")


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_in_bfloat16_answer_as_the_model_loaded_in_it(family, tmp_path):
    models.make(family, tmp_path / family)
    source = open_checkpoint(tmp_path / family)
    found = structure(source)
    runner = Runner(source, found)
    ids = models.inputs(family)
    runner.start(ids)  # float32 calls are learned beside those of bfloat16
    hidden = runner.start(ids, torch.bfloat16)
    for block in found.blocks:
        hidden = runner.forward(block, hidden, {})
        assert hidden.dtype == torch.bfloat16
    answer = torch.cat(list(runner.logits(hidden, ids, {})))
    with torch.no_grad():
        expected = lw.load(tmp_path / family, dtype=torch.bfloat16)(ids).logits
    assert answer.dtype == torch.bfloat16
    assert torch.equal(answer, expected)


def test_compress_and_evaluate_find_the_same_floor(llama, text, tmp_path):
    texts = {"text": text, "text_samples": 6, "length": 32}
    report = lw.compress(llama, tmp_path / "out", bits=3, group=16, **texts)
    seen = lw.evaluate(tmp_path / "out", against=llama, text=text, **READ)
    assert report.noise_floor is not None
    assert seen.noise_floor is not None
    assert report.noise_floor.kl == pytest.approx(seen.noise_floor.kl, rel=1e-3)
    assert report.comparison.kl == pytest.approx(seen.text.kl, rel=1e-3)
    assert report.noise_floor.digest == report.comparison.digest == seen.text.digest
    assert 0 < seen.noise_floor.kl < 0.1 * seen.text.kl
    assert seen.noise_floor.perplexity_before == seen.text.perplexity_before


def test_the_floor_can_be_left_out(llama, text, tmp_path):
    texts = {"text": text, "text_samples": 4, "length": 32}
    with_it = lw.compress(llama, tmp_path / "with", bits=3, group=16, **texts)
    without = lw.compress(llama, tmp_path / "without", bits=3, group=16, noise_floor=False, **texts)
    assert without.noise_floor is None
    assert without.comparison == with_it.comparison
    weights = [tmp_path / name / "model.safetensors" for name in ("with", "without")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert lw.evaluate(llama, text=text, **READ).noise_floor is None
    left = lw.evaluate(llama, against=llama, text=text, noise_floor=False, **READ)
    assert left.noise_floor is None
    assert left.text.kl == 0


def test_vocabularies_are_compared_before_models_are_loaded(llama, make_llama, tmp_path, no_load):
    other = make_llama(tmp_path / "other", vocab_size=128)
    with pytest.raises(UserError, match="128"):
        lw.evaluate(llama, against=other, text=["b" * 999], **READ)
