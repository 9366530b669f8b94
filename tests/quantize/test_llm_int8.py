import pytest
import torch
from trained import layers

import layerwise as lw
from layerwise.core.activation import Activation
from layerwise.core.errors import UserError
from layerwise.quantize.llm_int8 import Decomposed
from layerwise.quantize.llm_int8 import llm_int8 as in_groups

QUICK = {"text": "builtin", "text_samples": 2, "length": 32, "samples": 4, "noise_floor": False}
FORMS = ("float", "int8")


def llm_int8(weight, peak, **options):
    """With a scale for each row, as in the paper, unless a group is given."""
    return in_groups(weight, peak, **{"group": weight.shape[1]} | options)


def problem(rows=12, width=80, loud=30.0):
    noise = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, width, generator=noise).clamp(-5, 5)
    inputs[:, [7, 40]] *= loud
    inputs[0, [7, 40]] = 3 * loud
    return torch.randn(rows, width, generator=noise), inputs


def peak_of(inputs):
    return inputs.abs().amax(dim=0)


def token_by_token(weight, inputs, columns, outlier_weights):
    """The answer, entry by entry, in float64; scales of rows are rounded up to bfloat16."""
    keeps = outlier_weights == "float"
    answer = torch.zeros(len(inputs), len(weight)).double()
    inside = [j for j in range(weight.shape[1]) if j not in columns]
    for row, w in enumerate(weight):
        most = max(abs(float(w[j])) for j in (inside if keeps else range(len(w))))
        bits = (torch.tensor(most) / 127).view(torch.int32)
        step = float(((bits + 0xFFFF) & -0x10000).view(torch.float32))
        codes = (w / step).round()
        for token, x in enumerate(inputs):
            scale = float(x[inside].abs().max()) / 127
            total = float((x[inside] / scale).round().double() @ codes[inside].double())
            total *= scale * step
            for j in columns:
                kept = float(w[j].bfloat16()) if keeps else float(codes[j]) * step
                total += float(x[j]) * kept
            answer[token, row] = total
    return answer


@pytest.mark.parametrize("form", FORMS)
def test_matches_the_definition(form):
    weight, inputs = problem()
    made = llm_int8(weight, peak_of(inputs), outlier_weights=form)
    assert made.columns.tolist() == [7, 40]
    expected = token_by_token(weight, inputs, [7, 40], form)
    torch.testing.assert_close(made.answer(inputs).double(), expected, rtol=1e-4, atol=1e-3)


def test_without_outliers_it_is_vector_wise_int8():
    weight, inputs = problem()
    made = llm_int8(weight, peak_of(inputs), threshold=torch.inf)
    expected = token_by_token(weight, inputs, [], "int8")
    torch.testing.assert_close(made.answer(inputs).double(), expected, rtol=1e-4, atol=1e-3)
    none = llm_int8(weight, peak_of(inputs), columns=0.0)
    assert none.answer(inputs).equal(made.answer(inputs))
    assert none.notes == ("2 large inputs had no room and are rounded",)


def test_with_nothing_but_outliers_it_is_the_float_product():
    weight, inputs = problem()
    weight = weight.bfloat16().float()
    made = llm_int8(weight, peak_of(inputs), threshold=0.0, columns=1.0)
    assert made.dequantize().equal(weight)
    torch.testing.assert_close(made.answer(inputs), inputs @ weight.T)


def test_what_lies_on_its_grid_is_multiplied_exactly():
    noise = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (6, 40), generator=noise).float()
    inputs = torch.randint(-127, 128, (9, 40), generator=noise).float() / 4
    weight[:, 3], inputs[:, 5] = 127.0, -127.0 / 4
    made = llm_int8(weight, peak_of(inputs), threshold=1e3)
    torch.testing.assert_close(made.answer(inputs), inputs @ weight.T)


def test_a_token_gets_the_same_alone_and_among_others():
    weight, inputs = problem()
    made = llm_int8(weight, peak_of(inputs))
    torch.testing.assert_close(made.answer(inputs[:1]), made.answer(inputs)[:1])
    assert bool(made.answer(torch.zeros(1, 80)).eq(0).all())


def test_of_too_many_large_inputs_the_largest_are_kept():
    weight, inputs = problem()
    made = llm_int8(weight, peak_of(inputs), columns=0.02)
    assert made.columns.tolist() == [int(peak_of(inputs).argmax())]
    assert made.notes == ("1 large inputs had no room and are rounded",)


def test_weights_that_are_kept_leave_the_scales_of_their_rows():
    weight, inputs = problem()
    weight[:, 7] = 100.0
    kept, rounded = (llm_int8(weight, peak_of(inputs), outlier_weights=form) for form in FORMS)
    assert float(kept.scale.max()) < 0.1 < float(rounded.scale.min())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "group"), [((12, 80), 80), ((1, 37), 16), ((5, 1), 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stores_itself(form, shape, group, dtype):
    weight, inputs = problem(*shape) if shape[1] > 40 else (torch.randn(shape), torch.randn(9, 80))
    peak = peak_of(inputs)[: shape[1]]
    made = llm_int8(weight.to(dtype), peak, group=group, threshold=3.0, outlier_weights=form)
    told = {"bits": 8, "group": group, "symmetric": True, "columns": 0.05, "outlier_weights": form}
    parts = made.parts(told)
    layout = Decomposed.layout(*shape, told)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == layout
    again = Decomposed.read(parts, *shape, told).with_activation(Activation("int8"))
    assert again.grid_values().equal(made.grid_values())
    inputs = inputs[:, : shape[1]]
    assert again.answer(inputs).equal(made.answer(inputs))
    stored = sum(part.numel() * part.element_size() * 8 for part in parts.values())
    assert made.bits_per_weight() <= stored / weight.numel()


@pytest.mark.parametrize(
    "options", [{"bits": 4}, {"columns": 2.0}, {"threshold": -1.0}, {"outlier_weights": "fp16"}]
)
def test_refuses_what_it_does_not_have(options):
    weight, inputs = problem()
    with pytest.raises(UserError):
        llm_int8(weight, peak_of(inputs), **options)


@pytest.mark.parametrize("form", FORMS)
def test_the_loaded_model_is_the_one_in_memory(form, llama, tmp_path):
    report = lw.compress(
        llama, tmp_path / "out", bits=8, group=0, method="llm_int8", calibration="builtin",
        cache=False, options={"quantize/llm_int8": {"threshold": 1.0, "outlier_weights": form}},
        **QUICK,
    )  # fmt: skip
    assert report.proof is not None
    again = lw.evaluate(str(tmp_path / "out"), against=llama, text="builtin", samples=2, length=32)
    assert again.text.kl == pytest.approx(report.comparison.kl, rel=1e-3)


def test_inputs_that_are_to_be_rounded_otherwise_are_refused(llama, tmp_path):
    with pytest.raises(UserError, match="in its own way"):
        lw.compress(
            llama, tmp_path / "out", bits=8, group=0, method="llm_int8", activation="fp8",
            calibration="builtin", **QUICK,
        )  # fmt: skip


@pytest.mark.trained
@pytest.mark.parametrize(("factor", "share"), [(30.0, 0.2), (200.0, 0.01)])
def test_with_outliers_answers_are_far_closer(factor, share):
    """The card's claim, on answers: 0.2 of vector-wise int8 at 30, 0.01 at 200."""
    lost = {"decomposed": 0.0, "vector-wise": 0.0}
    for one in layers(outliers=factor):
        exact = one.inputs @ one.weight.T
        for name, threshold in (("decomposed", 6.0), ("vector-wise", torch.inf)):
            made = llm_int8(one.weight, one.evidence["peak"], threshold=threshold)
            missed = made.answer(one.inputs) - exact
            lost[name] += float(missed.square().sum() / exact.square().sum())
    assert lost["decomposed"] <= share * lost["vector-wise"]
