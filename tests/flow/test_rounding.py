"""Models whose layers' inputs are rounded too, and codes that a format has no place for."""

import pytest
import torch
from torch import nn

import layerwise as lw
from layerwise.core.activation import SCHEMES
from layerwise.core.errors import UserError

QUICK = {"text": "builtin", "text_samples": 2, "length": 32, "samples": 4, "noise_floor": False}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_loaded_model_rounds_inputs_as_the_one_in_memory_did(llama, scheme, tmp_path):
    asked = {"bits": 8, "group": 0, "calibration": "builtin", "cache": False}
    plain = lw.compress(llama, tmp_path / "plain", **asked, **QUICK)
    rounded = lw.compress(llama, tmp_path / "out", **asked, **QUICK, activation=scheme)
    assert rounded.format == "layerwise"
    assert rounded.proof is not None
    assert rounded.comparison.kl > plain.comparison.kl
    again = lw.evaluate(str(tmp_path / "out"), against=llama, text="builtin", samples=2, length=32)
    assert again.text.kl == pytest.approx(rounded.comparison.kl, rel=1e-3)


def test_a_correction_sees_inputs_that_are_not_rounded(llama, tmp_path):
    report = lw.compress(
        llama, tmp_path / "out", bits=4, group=16, rank=2, activation="int4", **QUICK
    )
    assert report.proof is not None
    assert report.proof.largest_difference <= report.proof.allowed


def test_convolutions_round_their_inputs_too(tmp_path):
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
    )
    pictures = torch.randn(16, 3, 8, 8)
    report = lw.compress(
        module, tmp_path / "out", bits=8, group=0, activation="int8", calibration=pictures
    )
    assert report.proof is not None
    rounded = lw.load(tmp_path / "out", into=module)
    exact = lw.compress(module, tmp_path / "exact", bits=8, group=0, format="layerwise")
    assert exact.format == "layerwise"
    plain = lw.load(tmp_path / "exact", into=module)
    wanted, lost = module(pictures), (rounded(pictures) - plain(pictures)).abs().max()
    assert 0 < lost < 0.05 * wanted.abs().max()


def test_a_module_that_the_files_do_not_fit_is_refused(tmp_path):
    lw.compress(nn.Sequential(nn.Linear(8, 4)), tmp_path / "out", bits=8, group=0)
    with pytest.raises(UserError, match=r"0\.weight of \(4, 9\); .* has \(4, 8\)"):
        lw.load(tmp_path / "out", into=nn.Sequential(nn.Linear(9, 4)))
    with pytest.raises(UserError, match=r"1\.weight .* has none"):
        lw.load(tmp_path / "out", into=nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4)))


@pytest.mark.parametrize("format", ["dense", "gptq", "gguf"])
def test_formats_without_a_place_for_it_are_refused_first(llama, format, tmp_path):
    with pytest.raises(UserError, match="no place for inputs that are rounded") as refused:
        lw.compress(
            llama, tmp_path / "out", bits=4, symmetric=True, group=32, activation="int8",
            format=format,
        )  # fmt: skip
    assert "layerwise" in refused.value.remedy
    assert not (tmp_path / "out").exists()


def test_one_scale_for_all_tokens_wants_a_calibration_text(llama, tmp_path):
    with pytest.raises(UserError, match="one scale for the inputs"):
        lw.compress(llama, tmp_path / "out", bits=8, activation="int8-static")


def test_codes_that_a_format_cannot_hold_are_stored_in_full_and_the_report_says_so(llama, tmp_path):
    report = lw.compress(
        llama, tmp_path / "out", bits=8, method="fp8", format="gptq", group=16, **QUICK
    )
    assert any("stored in full" in note for note in report.notes)
    assert {row.stored_bits for row in report.layers} == {32.0}
    assert report.proof is not None
