import math

import pytest
import torch
from trained import layers

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.quantize.baq import Allotted, _packed, _unpacked, baq
from layerwise.quantize.gptq import gptq

QUICK = {"text": "builtin", "text_samples": 2, "length": 32, "samples": 4, "noise_floor": False}


def problem(rows=40, width=64, spread=1.0):
    noise = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, width, generator=noise)
    inputs += inputs[:, :1] / 2
    inputs *= torch.logspace(-spread, spread, width)
    return torch.randn(rows, width, generator=noise), inputs.T @ inputs / 300


def damped(gram):
    return gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(len(gram))


def rounded_slowly(weight, gram, levels):
    """Pass by pass of the card, in float64, on ranges of rows that bfloat16 holds."""
    factor = torch.linalg.cholesky(torch.linalg.inv(damped(gram)), upper=True)
    most = weight.amax(dim=1).clamp(min=0).double()
    least = weight.amin(dim=1).clamp(max=0).double()
    left, rounded, losses = weight.double(), torch.zeros_like(weight).double(), []
    for j, n in enumerate(levels):
        if n > 1:
            step = (most - least) / (n - 1)
            zero = (-least / step).round()
            rounded[:, j] = (((left[:, j] / step).round() + zero).clamp(0, n - 1) - zero) * step
        error = (left[:, j] - rounded[:, j]) / factor[j, j]
        losses.append(float(error.square().sum() / 2))
        left[:, j:] -= error[:, None] * factor[j, j:]
    return rounded, losses


def storable_ends(weight):
    """The same weight with ends of its rows that bfloat16 holds."""
    made = weight.clone()
    made[:, 0], made[:, 1] = -4.0, 3.5
    return made.clamp(-4.0, 3.5)


def loss(made, weight, gram):
    error = (made.dequantize() - weight).double()
    return float((error @ gram.double() * error).sum())


@pytest.mark.parametrize("real", [False, True])
def test_matches_the_definition(real):
    weight, gram = problem()
    weight = storable_ends(weight)
    made = baq(weight, gram, bits=3, group=64, real=real)
    _, losses = rounded_slowly(weight, gram, [8] * 64)
    levels = made.levels.tolist()
    rounded, _ = rounded_slowly(weight, gram, levels)
    torch.testing.assert_close(made.dequantize().double(), rounded, rtol=0, atol=1e-5)
    # Columns that lost more have more points.
    mean = sum(map(math.log2, losses)) / 64
    wanted = [3 + (math.log2(one) - mean) / 1.95 for one in losses]
    moved = [math.log2(n) - w for n, w in zip(levels, wanted, strict=True) if n > 2]
    assert max(moved) - min(moved) < (1.0 if not real else 0.6)


def test_whole_widths_spend_every_bit_where_it_gains_most():
    weight, gram = problem()
    weight = storable_ends(weight)
    widths = baq(weight, gram, bits=3, group=64).levels.double().log2().long().tolist()
    assert sum(widths) == 3 * 64
    _, losses = rounded_slowly(weight, gram, [8] * 64)
    pairs = list(zip(losses, widths, strict=True))
    last = min(math.log2(lost) / 1.95 - width for lost, width in pairs if width > 0)
    following = max(math.log2(lost) / 1.95 - width - 1 for lost, width in pairs)
    assert following <= last + 1e-3


@pytest.mark.parametrize("real", [False, True])
def test_columns_that_lose_alike_get_alike(real):
    noise = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 1, generator=noise).bfloat16().float().expand(40, 32).contiguous()
    made = baq(weight, torch.eye(32), bits=3, group=32, real=real)
    assert made.levels.tolist() == [8] * 32
    rounded, _ = rounded_slowly(weight, torch.eye(32), [8] * 32)
    torch.testing.assert_close(made.dequantize().double(), rounded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("real", [False, True])
def test_loses_less_than_as_many_points_everywhere(real):
    weight, gram = problem()
    made = baq(weight, gram, bits=3, group=64, real=real)
    assert loss(made, weight, gram) < 0.8 * loss(
        gptq(weight, gram, bits=3, group=64, clips=1), weight, gram
    )


def test_inputs_that_were_never_seen_get_no_bits():
    weight, gram = problem()
    gram[[3, 8]] = 0.0
    gram[:, [3, 8]] = 0.0
    made = baq(weight, gram, bits=3, group=64)
    assert made.levels[[3, 8]].tolist() == [1, 1]
    assert not made.dequantize()[:, [3, 8]].any()
    assert "2 inputs were always zero" in made.notes[1]
    blind = baq(weight, torch.zeros_like(gram), bits=3, group=64)
    assert float(blind.levels.double().log2().mean()) == 3.0


@pytest.mark.parametrize("levels", [2, 3, 5, 6, 7, 8, 10, 100, 255, 256, 9999])
@pytest.mark.parametrize("entries", [1, 40, 41, 1000])
def test_codes_to_any_base_come_back(levels, entries):
    codes = torch.randint(levels, (entries,)).int()
    codes[-1] = levels - 1
    assert _unpacked(_packed(codes, levels), entries, levels).equal(codes)


def test_full_words_come_back():
    for levels in (3, 5, 7, 255):
        codes = torch.full((200,), levels - 1).int()
        assert _unpacked(_packed(codes, levels), 200, levels).equal(codes)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("shape", "bits", "group"), [((40, 64), 3, 16), ((7, 37), 4, 16), ((1, 5), 2, 3)]
)
def test_stores_itself_in_a_room_that_is_known_before(real, symmetric, shape, bits, group):
    weight, gram = problem(*shape)
    options = {"bits": bits, "group": group, "symmetric": symmetric, "real": real}
    made = baq(weight.bfloat16(), gram, **options)
    parts = made.parts(options)
    layout = Allotted.layout(*shape, options)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == layout
    again = Allotted.read(parts, *shape, options)
    assert again.grid_values().equal(made.grid_values())
    stored = sum(part.numel() * part.element_size() * 8 for part in parts.values())
    assert made.bits_per_weight() == pytest.approx(stored / weight.numel())


@pytest.mark.parametrize("options", [{"bits": 9}, {"theta": 0.0}, {"theta": math.inf}])
def test_refuses_what_it_does_not_have(options):
    with pytest.raises(UserError):
        baq(*problem(), **{"bits": 3} | options)


@pytest.mark.parametrize("real", [False, True])
def test_the_loaded_model_is_the_one_in_memory(real, llama, tmp_path):
    report = lw.compress(
        llama, tmp_path / "out", bits=3, group=0, method="baq", calibration="builtin",
        cache=False, format="layerwise", options={"quantize/baq": {"real": real}}, **QUICK,
    )  # fmt: skip
    assert report.proof is not None
    assert report.proof.largest_difference <= report.proof.allowed


@pytest.mark.trained
def test_on_a_trained_model_columns_lose_less_in_sum():
    """The card's claim at 3 bits per row: at most 0.8 of the loss of 8 points everywhere."""
    ratios = []
    for one in layers():
        weight, gram = one.weight, one.evidence["gram"]
        made = baq(weight, gram, bits=3, group=weight.shape[1], real=True)
        plain = gptq(weight, gram, bits=3, group=weight.shape[1], clips=1)
        ratios.append(loss(made, weight, damped(gram)) / loss(plain, weight, damped(gram)))
        assert float(made.levels.double().log2().mean()) <= 3.02
    assert sum(ratios) / len(ratios) <= 0.8
