"""Models that are no language models: worked on, proven where they can be, refused where not."""

import models
import pytest
import torch
import transformers

import layerwise as lw
from layerwise.core.errors import UserError

TEXT = {"calibration": torch.arange(256).reshape(8, 32) % 60, "samples": 8, "length": 32}


@pytest.fixture
def classifier(tmp_path):
    config = transformers.AutoConfig.for_model("bert", **models._TEXT)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_classifier_of_texts_is_calibrated_and_not_compared(classifier, tmp_path, method):
    report = lw.compress(classifier, tmp_path / "out", bits=4, group=16, method=method, **TEXT)
    assert report.comparison is None
    assert report.proof is None
    assert any("not proven" in note for note in report.notes)
    assert lw.load(tmp_path / "out").config.architectures == ["BertForSequenceClassification"]


def test_an_encoder_decoder_is_worked_on_by_weights_alone(tmp_path):
    config = transformers.AutoConfig.for_model(
        "t5", vocab_size=64, d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    lw.compress(tmp_path / "t5", tmp_path / "out", bits=4, group=16)
    with pytest.raises(UserError, match="encoder and a decoder"):
        lw.compress(tmp_path / "t5", tmp_path / "no", bits=4, group=16, method="gptq", **TEXT)


def test_pictures_have_no_text(tmp_path):
    models.make("vit", tmp_path / "vit")
    lw.compress(tmp_path / "vit", tmp_path / "out", bits=4, group=16)
    wish = {"bits": 4, "method": "gptq", "calibration": "builtin", "length": 32}
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        lw.compress(tmp_path / "vit", tmp_path / "no", **wish)


def test_windows_end_where_positions_do(tmp_path):
    models.make("gpt2", tmp_path / "gpt2")
    with pytest.raises(UserError, match="positions end at 64"):
        lw.evaluate(tmp_path / "gpt2", text=torch.zeros(256, dtype=torch.long), length=128)


@pytest.mark.parametrize("what", ["calibration", "text"])
def test_a_module_takes_tensors(what, tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(32, 8))
    with pytest.raises(UserError, match=f"{what} is a str.*takes tensors"):
        lw.compress(module, tmp_path / "out", bits=4, **{what: "builtin"})


def test_a_module_is_proven_on_the_text_that_is_given(tmp_path):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(32, 8))
    shown = torch.randn(5, 32)
    report = lw.compress(module, tmp_path / "a", bits=4, text=shown)
    assert report.proof is not None
    assert report.proof.tokens == shown.numel()
    assert lw.compress(module, tmp_path / "b", bits=4, text=shown, proof="none").proof is None


def test_a_classifier_of_pictures_in_memory(tmp_path):
    model, pictures = models.built("vit"), models.inputs("vit")
    wish = {"bits": 4, "group": 16, "method": "gptq"}
    report = lw.compress(model, tmp_path / "out", **wish, calibration=pictures)
    assert report.proof is not None
    assert report.comparison is None
    assert report.noise_floor is None


def test_a_transformers_model_in_memory(tmp_path):
    model = models.built("llama")
    ids = models.inputs("llama")
    report = lw.compress(model, tmp_path / "out", bits=4, group=16, method="gptq", calibration=ids)
    assert report.proof is not None
    assert report.comparison is not None
    assert report.comparison.kl > 0
