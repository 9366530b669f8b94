import itertools
import os

import pytest
import torch
from trained import layers

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.packing import unpack_bits
from layerwise.core.plan import LayerPlan
from layerwise.quantize.bitstack import SignBlocks, bitstack
from layerwise.quantize.rtn import rtn

ASSETS = os.environ.get("LAYERWISE_ASSETS", "")


def unscaled(weight, **options):
    return bitstack(weight, torch.eye(weight.shape[1]), **options)


def scaled_problem(rows=24, width=40):
    sizes = torch.linspace(0.2, 5.0, width)
    return torch.randn(rows, width), torch.diag(sizes.square()), sizes


def energy(matrix):
    return float(matrix.double().square().sum())


def by_definition(weight, sizes, blocks, columns):
    """The loop of the paper, in float64, on singular vectors of the whole matrix."""
    sizes = (sizes / sizes.log().mean().exp()).double()
    remaining, total = weight.double() * sizes, torch.zeros_like(weight, dtype=torch.float64)
    for _ in range(blocks):
        signs = torch.where(remaining >= 0, 1.0, -1.0).double()
        u, s, v = torch.linalg.svd(remaining.abs(), full_matrices=False)
        block = signs * (u[:, :columns] * s[:columns] @ v[:columns])
        remaining = remaining - block
        total = total + block / sizes
    return total


@pytest.mark.parametrize("columns", [1, 3])
def test_the_first_block_is_that_of_the_definition(columns):
    weight, gram, sizes = scaled_problem()
    made = bitstack(weight, gram, bits=1, factors=columns).dequantize().double()
    expected = by_definition(weight, sizes, 1, columns)
    assert energy(made - expected) < 1e-5 * energy(expected)


@pytest.mark.parametrize("blocks", [2, 5])
def test_blocks_leave_what_those_of_the_definition_leave(blocks):
    """A sign may turn where rounding left hardly anything, so not every entry is the same."""
    weight, gram, sizes = scaled_problem()
    made = bitstack(weight, gram, bits=blocks).dequantize().double()
    expected = by_definition(weight, sizes, blocks, 1)
    ours, theirs = (energy((one - weight) * sizes) for one in (made, expected))
    assert ours == pytest.approx(theirs, rel=0.05)


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_a_magnitude_of_that_rank_is_exact_after_one_block(columns):
    magnitude = torch.rand(20, columns) @ torch.rand(columns, 32)
    weight = magnitude * torch.randn(20, 32).sign()
    made = unscaled(weight, bits=1, factors=columns)
    torch.testing.assert_close(made.dequantize(), weight, rtol=4e-3, atol=1e-4)
    again = unscaled(weight, bits=3, factors=columns).dequantize()
    assert energy(again - weight) < 0.3 * energy(made.dequantize() - weight)


@pytest.mark.parametrize("columns", [0, 4])
def test_what_is_left_shrinks_with_every_block(columns):
    weight, gram, sizes = scaled_problem()
    left = [energy(weight * sizes)]
    for blocks in range(1, 17):
        made = bitstack(weight, gram, bits=blocks, factors=columns)
        left.append(energy((made.dequantize() - weight) * sizes))
    assert all(after < before for before, after in itertools.pairwise(left))
    assert left[-1] > 0


def test_a_block_of_noise_leaves_little_more_than_its_share():
    """The mean of |x| is sqrt(2 / pi) of normal noise: that much energy one number holds."""
    weight = torch.randn(400, 400)
    left = energy(unscaled(weight, bits=1, factors=1).dequantize() - weight) / energy(weight)
    assert left == pytest.approx(1 - 2 / torch.pi, rel=0.01)


def test_fewer_blocks_are_the_first_of_more():
    weight, gram, _ = scaled_problem()
    many = bitstack(weight, gram, bits=9)
    for blocks in (1, 4, 8):
        few = bitstack(weight, gram, bits=blocks)
        for name, part in few.parts({}).items():
            assert part.equal(many.parts({})[name][:blocks])
        told = LayerPlan(blocks, method="bitstack").told({})
        cut = {name: part[:blocks] for name, part in many.parts({}).items()}
        assert SignBlocks.read(cut, *weight.shape, told).grid_values().equal(few.grid_values())


def test_the_values_are_the_sum_of_signs_times_magnitudes():
    weight, gram, _ = scaled_problem(5, 7)  # 35 signs do not fill their bytes
    made = bitstack(weight, gram, bits=3, factors=2)
    for i in range(5):
        for j in range(7):
            total = 0.0
            for block in range(3):
                bits = unpack_bits(made.signs[block][None], 35)[0]
                sign = 1 if bits[7 * i + j] else -1
                total += sign * float(made.left[block, i].float() @ made.right[block, :, j].float())
            assert float(made.grid_values()[i, j]) == pytest.approx(total, abs=1e-5)


def test_zeros_are_positive():
    made = unscaled(torch.zeros(4, 8), bits=2)
    assert bool((made.signs == 255).all())
    assert bool((made.dequantize() == 0).all())


def test_large_inputs_lose_less():
    weight, gram, sizes = scaled_problem()
    ours = bitstack(weight, gram, bits=2).dequantize() - weight
    plain = unscaled(weight, bits=2).dequantize() - weight
    assert energy(ours * sizes) < energy(plain * sizes)
    assert energy(ours) > energy(plain)


def test_how_large_inputs_are_matters_only_among_them():
    weight, gram, _ = scaled_problem()
    once, more = (bitstack(weight, factor * gram, bits=3) for factor in (1, 64))
    torch.testing.assert_close(once.dequantize(), more.dequantize(), rtol=1e-3, atol=1e-3)


def test_inputs_that_were_never_seen_or_hardly_do_no_harm():
    weight, gram, _ = scaled_problem()
    gram[3], gram[7, 7] = 0.0, 1e-16
    restored = bitstack(weight, gram, bits=8).dequantize()
    assert energy(restored - weight) < 0.05 * energy(weight)
    assert bitstack(weight, torch.zeros_like(gram), bits=3).signs.equal(
        unscaled(weight, bits=3).signs
    )


@pytest.mark.parametrize(
    ("shape", "columns", "expected"),
    [
        ((8, 300), 0, 1),
        ((384, 300), 0, 1),
        ((400, 390), 0, 2),
        ((1, 64), 0, 1),
        ((9, 4), 16, 4),
        ((64, 48), 3, 3),
    ],
)
def test_columns_go_by_the_smaller_side(shape, columns, expected):
    made = unscaled(torch.randn(shape), bits=1, factors=columns)
    assert made.left.shape == (1, shape[0], expected)
    assert made.right.shape == (1, expected, shape[1])


@pytest.mark.parametrize("shape", [(1, 64), (5, 61), (48, 1), (3, 33), (1, 1)])
@pytest.mark.parametrize("blocks", [1, 3, 16])
def test_what_is_stored_is_read_back(shape, blocks):
    rows, width = shape
    weight = torch.randn(shape)
    weight[0] *= 0.0
    made = unscaled(weight, bits=blocks)
    told = LayerPlan(blocks, 0, False, "bitstack").told({})
    parts, layout = made.parts(told), SignBlocks.layout(rows, width, told)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == dict(layout)
    stored = sum(part.nbytes for part in parts.values())
    assert SignBlocks.taken(rows, width, told) == stored
    assert made.bits_per_weight() == 8 * stored / weight.numel()
    assert SignBlocks.read(parts, rows, width, told).grid_values().equal(made.grid_values())


def test_a_block_takes_what_the_paper_says():
    made = unscaled(torch.randn(128, 256), bits=4)
    assert made.bits_per_weight() == 4 * (1 + 16 * (128 + 256) / (128 * 256))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(dtype):
    weight = torch.randn(8, 64).to(dtype)
    ours, theirs = unscaled(weight, bits=3), unscaled(weight.float(), bits=3)
    assert ours.dequantize().equal(theirs.dequantize())


@pytest.mark.parametrize("size", [2.0**-20, 2.0**20])
def test_any_size_of_weights_will_do(size):
    weight = torch.randn(16, 64)
    ours, theirs = unscaled(size * weight, bits=4), unscaled(weight, bits=4)
    assert energy(ours.dequantize() / size - weight) == pytest.approx(
        energy(theirs.dequantize() - weight), rel=0.01
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [({"bits": 17}, "bits is 17"), ({"bits": 0}, "bits is 0"), ({"factors": -1}, "factors is -1")],
)
def test_refuses_nonsense(options, says):
    with pytest.raises(UserError, match=says):
        unscaled(torch.randn(4, 8), **{"bits": 4} | options)


def test_refuses_what_float16_cannot_hold():
    with pytest.raises(UserError, match="too large for float16"):
        unscaled(1e20 * torch.randn(4, 8), bits=2)


@pytest.mark.parametrize("options", [{}, {"factors": 2}])
def test_a_model_is_written_and_read_back(llama, tmp_path, options):
    report = lw.compress(
        llama, tmp_path / "out", bits=3, method="bitstack", format="layerwise", text="builtin",
        calibration="builtin", samples=4, text_samples=2, length=32, noise_floor=False,
        options={"quantize/bitstack": options},
    )  # fmt: skip
    assert report.proof is not None


def test_a_budget_chooses_among_blocks(llama, tmp_path):
    report = lw.compress(
        llama, tmp_path / "out", budget="5bits", allow={"bits": [1, 2, 3, 5]}, method="bitstack",
        format="layerwise", calibration="builtin", samples=4, length=32, text="builtin",
        text_samples=2, noise_floor=False, layer_windows=0,
    )  # fmt: skip
    assert report.average_bits <= 5
    assert len({row.bits for row in report.layers}) > 1


# On the trained model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ways():
    """Cross-entropy, in nats, of the trained model with its layers made in some way."""
    if not ASSETS:
        pytest.skip("LAYERWISE_ASSETS is not set")
    model = lw.load(f"{ASSETS}/models/bytes-wikitext")
    with open(f"{ASSETS}/text/wikitext2/test.txt", "rb") as file:
        ids = torch.tensor(list(file.read(64 * 200 * 20)), dtype=torch.long).reshape(-1, 64)[::20]
    known = {}

    def loss(name, make):
        if name not in known:
            with torch.no_grad():
                for one in layers():
                    gram = one.evidence["gram"]
                    holder = model.get_submodule(one.layer.name)
                    holder.weight.copy_(make(one.weight, gram))
                known[name] = float(model(ids, labels=ids).loss)
        return known[name]

    return loss


def stacked(blocks):
    return lambda weight, gram: bitstack(weight, gram, bits=blocks).dequantize()


def plainly(blocks):
    return lambda weight, gram: unscaled(weight, bits=blocks).dequantize()


def svd_at_the_bits_of(blocks):
    """What as many bytes of float16 factors of the same scaled weight give."""

    def make(weight, gram):
        rows, width = weight.shape
        sizes = gram.diagonal().clamp(min=1e-12).sqrt()
        stored = bitstack(weight, gram, bits=blocks).bits_per_weight() * weight.numel()
        rank = round(stored / (16 * (rows + width)))
        u, s, v = torch.linalg.svd(weight * sizes, full_matrices=False)
        return (u[:, :rank] * s[:rank] @ v[:rank]) / sizes

    return make


@pytest.mark.trained
def test_a_trained_model_gets_better_with_every_block(ways):
    losses = [ways(f"stacked {blocks}", stacked(blocks)) for blocks in range(1, 6)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.trained
@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_signs_beat_factors_of_the_same_bytes(ways, blocks):
    ours = ways(f"stacked {blocks}", stacked(blocks))
    assert ours < ways(f"svd {blocks}", svd_at_the_bits_of(blocks))


@pytest.mark.trained
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_scale_helps_a_trained_model(ways, blocks):
    ours = ways(f"stacked {blocks}", stacked(blocks))
    assert ours < ways(f"plain {blocks}", plainly(blocks))


@pytest.mark.trained
def test_two_blocks_beat_rounding_to_two_bits(ways):
    rounded = ways("rtn", lambda weight, _: rtn(weight, bits=2, group=64).dequantize())
    assert ways("stacked 2", stacked(2)) < rounded
