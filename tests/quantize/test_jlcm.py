"""Books of values for groups of rows, against their definition."""

import os

import pytest
import torch
import trained

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.learning import OutputError, learn
from layerwise.core.plan import LayerPlan
from layerwise.quantize.jlcm import Codebooks, JointlyLearned, jlcm

ASSETS = os.environ.get("LAYERWISE_ASSETS", "")
NOISE = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(24, 64, generator=NOISE) * torch.linspace(0.5, 3, 24)[:, None]
INPUTS = torch.randn(500, 64, generator=NOISE) @ torch.randn(64, 64, generator=NOISE)
GRAM = INPUTS.T @ INPUTS / len(INPUTS)


def error(weight, made):
    return float((made.dequantize() - weight).square().sum())


def test_rows_of_like_size_share_a_book():
    made = jlcm(WEIGHT, GRAM, bits=3, steps=0)
    order = sorted(range(24), key=lambda row: float(WEIGHT[row].abs().mean()))
    assert [int(made.book[row]) for row in order] == [n // 6 for n in range(24)]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_without_steps_books_are_k_means_and_codes_the_nearest(bits):
    made = jlcm(WEIGHT, GRAM, bits=bits, books=3, steps=0)
    for number, book in enumerate(made.values.float()):
        rows = made.book == number
        weights, codes = WEIGHT[rows].flatten().tolist(), made.codes[rows].flatten().tolist()
        members: list[list[float]] = [[] for _ in book]
        for weight, code in zip(weights, codes, strict=True):
            nearest = min(abs(weight - float(value)) for value in book)
            assert abs(weight - float(book[code])) <= nearest + 1e-7
            members[code].append(weight)
        # Lloyd's steps have ended: every value is the mean of its weights, as it can be stored.
        for value, own in zip(book.tolist(), members, strict=True):
            assert own
            mean = sum(own) / len(own)
            assert value == pytest.approx(mean, rel=2**-7, abs=0.02)


def test_k_means_ends_near_the_best_of_many_starts():
    weight = torch.randn(1, 3000)
    ours = error(weight, jlcm(weight, torch.eye(3000), bits=3, steps=0))
    tried = []
    for _ in range(5):
        means = weight[0, torch.randperm(3000)[:8]].sort().values
        for _ in range(100):
            codes = (weight[0, :, None] - means).abs().argmin(dim=1)
            means = torch.stack([weight[0, codes == n].mean() for n in range(8)]).sort().values
        tried.append(float((weight[0, :, None] - means).abs().amin(dim=1).square().sum()))
    assert ours < 1.05 * min(tried)


def test_as_many_values_as_numbers_lose_nothing():
    numbers = torch.tensor([-3.0, -0.5, 0.25, 0.375, 1.0, 7.0, 8.0, 100.0])
    weight = numbers[torch.randint(0, 8, (10, 30))]
    for books in (1, 4):
        made = jlcm(weight, torch.eye(30), bits=3, books=books, steps=0)
        assert made.dequantize().equal(weight)


def test_a_single_row_has_one_book_and_many_books_are_one_for_each_row():
    assert jlcm(WEIGHT[:1], GRAM, bits=3).values.shape == (1, 8)
    assert jlcm(WEIGHT, GRAM, bits=3, books=256, steps=0).values.shape == (24, 8)


def test_slopes_are_those_of_the_definition_written_slowly():
    layer = JointlyLearned(WEIGHT, bits=2, books=2)
    made = layer.coded()
    upstream = torch.randn(24, 64)
    with torch.enable_grad():
        (layer.weight() * upstream).sum().backward()
    book = made.values.float()
    values = torch.zeros(2, 4)
    for row in range(24):
        own, gap = book[made.book[row].long()], float(layer.gap[layer.book[row], 0])
        for column in range(64):
            code = int(made.codes[row, column])
            values[made.book[row].long(), code] += upstream[row, column]
            window = [code, code - 1, code + 1]
            shares = layer.logits[:, row, column].detach().exp()
            shares = shares / shares.sum()
            for place, other in enumerate(window):
                expected = 0.0
                if 0 <= other < 4:
                    away = float(own[other] - own[code])
                    sign = (away > 0) - (away < 0)
                    expected = float(shares[place]) * sign * gap * gap / (abs(away) + gap)
                found = float(layer.logits.grad[place, row, column])
                wanted = expected * float(upstream[row, column])
                assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(layer.learned.grad, values * layer.gap, rtol=1e-4, atol=1e-4)


def test_a_weight_between_two_values_has_logits_that_say_how_far():
    weight = torch.tensor([[0.0, 1.0, 0.25, 0.0, 1.0] + [0.0, 1.0] * 200])
    layer = JointlyLearned(weight + 3, bits=1)
    low, high = layer.coded().values[0].tolist()
    share = (3.25 - low) / (high - low)
    assert float(layer.logits.detach()[2, 0, 2]) == pytest.approx(8 * (2 * share - 1), rel=1e-3)
    assert float(layer.logits.detach()[0, 0, 2]) == 0.0


@pytest.mark.parametrize("bits", [2, 3])
def test_learning_lowers_the_error_of_the_output(bits):
    problem = OutputError(WEIGHT, GRAM)
    plain, learned = (
        problem.judged([jlcm(WEIGHT, GRAM, bits=bits, steps=n).dequantize()]) for n in (0, 200)
    )
    assert learned < 0.9 * plain


def test_the_codes_are_those_of_the_weight_that_was_learned():
    layer = JointlyLearned(WEIGHT, bits=3, steps=25)
    learn([layer], OutputError(WEIGHT, GRAM))
    made = layer.coded()
    assert made.dequantize().equal(layer.weight().detach())
    assert (made.values.float().diff(dim=1) >= 0).all()
    first = JointlyLearned(WEIGHT, bits=3).coded()
    moved = (made.codes.int() - first.codes.int()).abs()
    assert int(moved.max()) == 1


def test_zeros_stay_zero_however_values_move():
    weight = WEIGHT.where(WEIGHT.abs() > 0.6, 0.0)
    for bits in (1, 2, 4):
        made = jlcm(weight, GRAM, bits=bits, steps=30)
        assert (made.dequantize()[weight == 0] == 0).all()
    # Rows without zeros are not held to have that value.
    assert not (jlcm(WEIGHT + 20, GRAM, bits=3, steps=0).values == 0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (5, 61), (48, 1)])
def test_any_shape_and_precision_will_do(shape, dtype):
    weight, gram = torch.randn(shape).to(dtype), torch.eye(shape[1])
    weight[0] = 0.0
    ours, theirs = (jlcm(one, gram, bits=6, steps=3) for one in (weight, weight.float()))
    assert ours.dequantize().equal(theirs.dequantize())
    assert error(weight.float(), ours) <= 0.01 * float(weight.float().square().sum())


def test_dead_inputs_and_layers_of_zeros():
    gram = GRAM.clone()
    gram[7], gram[:, 7] = 0.0, 0.0
    assert jlcm(WEIGHT, gram, bits=3, steps=20).dequantize().isfinite().all()
    nothing = jlcm(torch.zeros(6, 10), torch.zeros(10, 10), bits=3, steps=5)
    assert not nothing.dequantize().any()


@pytest.mark.parametrize("books", [1, 4])
def test_what_is_stored_is_read_back_and_counted(books):
    weight = WEIGHT[:, :61]
    made = jlcm(weight, GRAM[:61, :61], bits=3, books=books, steps=4)
    told = LayerPlan(3, 0, False, "jlcm").told({"quantize/jlcm": {"books": books}})
    parts = made.parts(told)
    layout = Codebooks.layout(24, 61, told)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == dict(layout)
    assert Codebooks.read(parts, 24, 61, told).grid_values().equal(made.grid_values())
    stored = 3 * weight.numel() + 24 * 8 + books * 8 * 16
    assert made.bits_per_weight() == stored / weight.numel()
    assert Codebooks.taken(24, 61, told) == stored // 8


@pytest.mark.parametrize(
    "options", [{"bits": 9}, {"group": -1}, {"books": 0}, {"books": 257}, {"steps": -1}]
)
def test_refuses_nonsense(options):
    with pytest.raises(UserError, match=next(iter(options))):
        jlcm(WEIGHT, GRAM, **{"bits": 3} | options)


def test_a_model_is_learned_block_by_block_written_and_read_back(llama, tmp_path):
    quick = {"text": "builtin", "text_samples": 2, "length": 32, "samples": 8, "noise_floor": False}
    asked = {"bits": 3, "group": 0, "method": "jlcm", "format": "layerwise"}
    kl = []
    for steps in (0, 40):
        options = {"quantize/jlcm": {"steps": steps, "batch": 4}}
        report = lw.compress(
            llama, tmp_path / str(steps), **asked, options=options, calibration="builtin", **quick
        )
        assert report.proof is not None
        kl.append(report.comparison.kl)
    assert kl[1] < kl[0]


@pytest.mark.trained
@pytest.mark.parametrize("bits", [2, 3])
def test_books_of_rows_lose_less_of_trained_weights_than_one_of_the_layer(bits):
    """Claim A of the method's card: a ratio of at most 0.97, without data."""
    lost = {
        books: sum(
            error(one.weight, jlcm(one.weight, torch.eye(one.weight.shape[1]), bits=bits,
                                   books=books, steps=0))
            / float(one.weight.square().sum())
            for one in trained.layers()
        )
        for books in (1, 4)
    }  # fmt: skip
    assert lost[4] <= 0.97 * lost[1]


class _Soft(JointlyLearned):
    """The slope that is usual: it grows with distance."""

    def _slopes(self, shares, distance):
        return shares * distance


def unseen_errors(*kinds):
    """Errors of the output of layers on tokens that nothing was learned from."""
    errors = [0.0] * len(kinds)
    for one in (trained.layers()[4], trained.layers()[8]):
        seen, unseen = (part.T @ part / len(part) for part in one.inputs.split(1024))
        for place, (kind, steps) in enumerate(kinds):
            layer = kind(one.weight, bits=3, steps=steps)
            learn([layer], OutputError(one.weight, seen))
            errors[place] += OutputError(one.weight, unseen).judged([layer.weight().detach()])
    return errors


@pytest.mark.trained
def test_learning_on_trained_layers_holds_on_text_that_it_did_not_see():
    """Claim B of the method's card, its second half."""
    plain, learned = unseen_errors((JointlyLearned, 0), (JointlyLearned, 200))
    assert learned < 0.6 * plain


@pytest.mark.trained
@pytest.mark.xfail(reason="under Adam 0.98: it divides slopes by their size", strict=False)
def test_slopes_that_fall_with_distance_beat_those_that_grow():
    """Claim B of the method's card, its first half: a ratio of at most 0.95."""
    falling, growing = unseen_errors((JointlyLearned, 200), (_Soft, 200))
    assert falling <= 0.95 * growing
