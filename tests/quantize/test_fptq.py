import math

import pytest
import torch
from trained import layers

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.quantize.fptq import fptq
from layerwise.quantize.rtn import rtn

QUICK = {"text": "builtin", "text_samples": 2, "length": 32, "samples": 4, "noise_floor": False}


def problem(largest=40.0, rows=12, width=64):
    noise = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, width, generator=noise).clamp(-4, 4)
    inputs[:, 7] = largest * torch.rand(200, generator=noise)
    inputs[0, 7] = largest
    inputs[:, 9] = 0.0
    return torch.randn(rows, width, generator=noise), inputs


def strategy(made):
    if made.input_scale is not None:
        return "logarithmic"
    return "token" if made.activation.scale is None else "static"


@pytest.mark.parametrize(
    ("largest", "fold", "expected"),
    [
        (15.0, True, "static"),
        (15.1, True, "logarithmic"),
        (149.0, True, "logarithmic"),
        (150.0, True, "token"),
        (15.0, False, "static"),
        (15.1, False, "token"),
        (150.0, False, "token"),
    ],
)
def test_the_range_of_the_inputs_decides(largest, fold, expected):
    weight, inputs = problem(largest)
    made = fptq(weight, inputs.abs().amax(0), bits=4, group=32, fold=fold)
    assert strategy(made) == expected


def test_matches_the_equations():
    weight, inputs = problem()
    peak = [max(abs(float(x)) for x in column) for column in inputs.T]
    made = fptq(weight, torch.tensor(peak), bits=4, group=32)
    scale = torch.tensor([m / math.log2(2 + m) if m else 1.0 for m in peak])
    torch.testing.assert_close(made.input_scale, scale)
    assert made.codes.equal(rtn(weight * scale, bits=4, group=32, symmetric=True).codes)
    evened = inputs / scale
    torch.testing.assert_close(
        made.activation.scale, (evened.abs().max() / 127).reshape(1), rtol=1e-6, atol=0
    )
    assert float(made.activation.scale) == pytest.approx(math.log2(2 + 40.0) / 127)
    # Integer products, token by token and group by group.
    step = float(made.activation.scale)
    codes = (evened / step).round().clamp(-128, 127)
    answer = codes.double() @ made.grid_values().double().T * step
    torch.testing.assert_close(made.answer(evened).double(), answer, rtol=1e-4, atol=1e-4)


def test_with_nothing_rounded_evening_out_changes_nothing():
    weight, inputs = problem()
    made = fptq(weight, inputs.abs().amax(0), bits=16, group=64)
    evened = inputs / made.input_scale
    torch.testing.assert_close(evened @ made.grid_values().T, inputs @ weight.T, rtol=0, atol=0.02)


def test_an_input_that_was_never_seen_keeps_its_weights():
    weight, inputs = problem()
    made = fptq(weight, inputs.abs().amax(0), bits=8, group=32)
    assert float(made.input_scale[9]) == 1.0
    torch.testing.assert_close(made.dequantize()[:, 9], weight[:, 9], atol=0.1, rtol=0)
    blind = fptq(weight, torch.zeros(64), bits=8, group=32)
    assert strategy(blind) == "static"


def test_layers_of_one_input_share_its_scale():
    weight, inputs = problem()
    first, second = fptq(weight, inputs.abs().amax(0), bits=4, group=32).split([4, 8])
    assert first.input_scale.equal(second.input_scale)
    assert first.activation == second.activation


@pytest.mark.parametrize("options", [{"v0": -1.0}, {"v0": 20.0, "v1": 10.0}])
def test_refuses_ranges_that_are_none(options):
    weight, inputs = problem()
    with pytest.raises(UserError, match="v0"):
        fptq(weight, inputs.abs().amax(0), bits=4, **options)


def test_refuses_statistics_that_are_no_numbers():
    weight, inputs = problem()
    with pytest.raises(UserError, match="statistics"):
        fptq(weight, inputs.abs().amax(0).fill_(torch.nan), bits=4)


def test_layers_that_nothing_feeds_are_rounded_by_it_too(llama, tmp_path):
    report = lw.compress(
        llama, tmp_path / "out", bits=4, group=16, method="fptq", calibration="builtin",
        cache=False, options={"quantize/fptq": {"v0": 0.1}}, **QUICK,
    )  # fmt: skip
    assert {row.method for row in report.layers} == {"fptq"}
    assert report.proof is not None
    again = lw.evaluate(str(tmp_path / "out"), against=llama, text="builtin", samples=2, length=32)
    assert again.text.kl == pytest.approx(report.comparison.kl, rel=1e-3)


@pytest.mark.trained
def test_with_outliers_most_of_what_static_rounding_loses_is_won_back():
    """The card's claim on answers: at most 0.15 of what one scale for all tokens adds."""
    added = {"fptq": 0.0, "static": 0.0}
    for one in layers(outliers=30.0):
        peak = one.evidence["peak"]
        whole = float((one.inputs @ one.weight.T).square().sum())
        for name, options in (
            ("fptq", {"fold": bool(one.layer.feeder)}),
            ("static", {"v0": torch.inf, "v1": torch.inf}),
        ):
            made = fptq(one.weight, peak, bits=4, group=64, **options)
            inputs = one.inputs if made.input_scale is None else one.inputs / made.input_scale
            exact = inputs @ made.grid_values().T
            added[name] += float((made.answer(inputs) - exact).square().sum()) / whole
    assert added["fptq"] <= 0.15 * added["static"]
