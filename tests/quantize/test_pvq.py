import itertools
import os

import pytest
import torch

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.plan import LayerPlan
from layerwise.quantize import pvq as module
from layerwise.quantize.pvq import Pyramid, pvq
from layerwise.quantize.rtn import rtn

ASSETS = os.environ.get("LAYERWISE_ASSETS", "")


def problem(rows=20, width=96):
    mixing = torch.eye(width) + torch.randn(width, width) / 10
    inputs = torch.randn(3 * width, width) @ mixing
    return torch.randn(rows, width), inputs.T @ inputs / len(inputs)


def alone(weight, **options):
    return pvq(weight, torch.eye(weight.shape[1]), feedback=False, **options)


def lost(weight, restored):
    return float((restored - weight).square().sum() / weight.square().sum())


def test_counts_are_those_of_the_recurrence():
    sphere = module._sphere(4, 6)
    assert list(sphere.counts[4][:7]) == [1, 8, 32, 88, 192, 360, 608]
    assert sphere.counts[3][4] == 66


@pytest.mark.parametrize(
    ("group", "pulses"),
    [(16, (4, 12, 27, 58)), (32, (7, 22, 50, 105)), (64, (14, 43, 96, 199)), (128, (28, 84, 187))],
)
def test_pulses_are_the_most_that_the_bits_allow(group, pulses):
    spheres = [module._sphere(group, bits) for bits in range(1, len(pulses) + 1)]
    assert tuple(sphere.pulses for sphere in spheres) == pulses
    for bits, sphere in enumerate(spheres, 1):
        count = sphere.counts[group][sphere.pulses]
        assert 2 ** (sphere.bits - 1) < count <= 2**sphere.bits <= 2 ** (bits * group)


@pytest.mark.parametrize(("entries", "pulses"), [(3, 4), (1, 1), (2, 3), (4, 2)])
def test_every_direction_has_a_number_of_its_own(entries, pulses):
    sphere = module._sphere(entries, 6)._replace(pulses=pulses)
    each = range(-pulses, pulses + 1)
    vectors = [
        list(v) for v in itertools.product(each, repeat=entries) if sum(map(abs, v)) == pulses
    ]
    numbers = [module._index(vector, sphere) for vector in vectors]
    assert sorted(numbers) == list(range(len(vectors)))
    assert len(vectors) == sphere.counts[entries][pulses]
    assert [module._entries(number, entries, sphere) for number in numbers] == vectors


def greedy(row, pulses):
    """The search as it is printed, with all sums made anew."""
    sizes = [abs(value) for value in row]
    vector = [int(pulses * size / sum(sizes)) for size in sizes]
    while sum(vector) < pulses:
        tried = [[v + (i == at) for i, v in enumerate(vector)] for at in range(len(row))]
        gains = [
            sum(a * v for a, v in zip(sizes, one, strict=True)) ** 2 / sum(v * v for v in one)
            for one in tried
        ]
        vector = tried[gains.index(max(gains))]
    return [v if value >= 0 else -v for v, value in zip(vector, row, strict=True)]


@pytest.mark.parametrize(("group", "bits"), [(8, 2), (16, 3), (24, 1)])
def test_directions_are_those_of_the_greedy_search(group, bits):
    weight = torch.randn(4, 48)
    made = alone(weight, bits=bits, group=group)
    pulses = module._sphere(group, bits).pulses
    for row, ours in zip(weight.reshape(-1, group), made.vectors.reshape(-1, group), strict=True):
        assert ours.tolist() == greedy(row.double().tolist(), pulses)


def test_the_length_is_the_best_for_its_direction():
    weight = torch.randn(6, 64)
    made = alone(weight, bits=2, group=32)
    for row, vector, length in zip(
        weight.reshape(-1, 32), made.vectors.reshape(-1, 32), made.length.flatten(), strict=True
    ):
        unit = vector / vector.float().norm()
        torch.testing.assert_close(float(length), float(row @ unit), rtol=2**-8, atol=0.0)


def test_a_direction_of_whole_numbers_is_found():
    sphere = module._sphere(16, 3)
    vector = torch.zeros(16)
    for at in torch.randint(16, (sphere.pulses,)).tolist():
        vector[at] += 1
    vector[::3] *= -1
    made = alone(0.37 * vector[None], bits=3, group=16)
    assert made.vectors.equal(vector[None].to(torch.int16))
    assert lost(0.37 * vector[None], made.dequantize()) < 1e-5


@pytest.mark.parametrize("bits", range(1, 7))
def test_magnitudes_sum_to_k_and_the_error_falls(bits):
    weight = torch.randn(8, 128)
    made = alone(weight, bits=bits, group=64)
    pulses = module._sphere(64, bits).pulses
    assert bool((made.vectors.reshape(-1, 64).abs().sum(dim=1) == pulses).all())
    assert lost(weight, made.dequantize()) < 1.7 / 4**bits


def test_half_the_error_of_rounding_at_the_same_bits():
    weight = torch.randn(32, 256)
    for bits in (2, 3, 4):
        ours, theirs = alone(weight, bits=bits), rtn(weight, bits=bits)
        assert ours.bits_per_weight() <= theirs.bits_per_weight()
        assert lost(weight, ours.dequantize()) < 0.6 * lost(weight, theirs.dequantize())


def test_later_groups_absorb_errors():
    """Against the update with the inverse of H itself: H_rest,rest^-1 carries what is left."""
    weight, gram = problem(width=48)
    made = pvq(weight, gram, bits=2, group=16)
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(48)
    left = weight.double()
    for start in range(0, 48, 16):
        stop = start + 16
        restored = alone(left[:, start:stop].float(), bits=2, group=16).dequantize().double()
        assert made.dequantize()[:, start:stop].allclose(restored.float())
        if stop < 48:
            # The best move of the rest: minimize tr(D H D^T) with the group's own part given.
            missed = left[:, start:stop] - restored
            cross, rest = damped[start:stop, stop:], damped[stop:, stop:]
            left[:, stop:] += missed @ cross @ torch.linalg.inv(rest)


def test_feedback_lowers_the_error_of_outputs():
    weight, gram = problem(rows=48)

    def loss(made):
        error = made.dequantize() - weight
        return float((error @ gram * error).sum())

    for bits in (2, 3):
        ours = loss(pvq(weight, gram, bits=bits, group=16))
        assert ours < 0.8 * loss(pvq(weight, gram, bits=bits, group=16, feedback=False))


def test_inputs_that_were_never_seen_absorb_nothing_and_break_nothing():
    weight, gram = problem()
    gram[:, 40:] = gram[40:] = 0.0
    made = pvq(weight, gram, bits=3, group=32)
    assert made.dequantize().isfinite().all()
    assert pvq(weight, torch.zeros_like(gram), bits=3, group=32).vectors.equal(
        alone(weight, bits=3, group=32).vectors
    )


def test_raised_damping_is_noted():
    weight, gram = problem()
    made = pvq(weight, gram - 0.05 * gram.diagonal().mean() * torch.eye(96), bits=3)
    assert "damping raised" in made.notes[0]


@pytest.mark.parametrize("shape", [(1, 64), (5, 61), (48, 1), (3, 33)])
@pytest.mark.parametrize("bits", [1, 3, 6])
def test_what_is_stored_is_read_back(shape, bits):
    rows, width = shape
    weight = torch.randn(shape)
    weight[0] = 0.0
    made = alone(weight, bits=bits, group=16)
    told = LayerPlan(bits, 16, True, "pvq").told({})
    parts, layout = made.parts(told), Pyramid.layout(rows, width, told)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == dict(layout)
    stored = 8 * sum(part.nbytes for part in parts.values())
    assert made.bits_per_weight() == stored / weight.numel()
    assert Pyramid.read(parts, rows, width, told).grid_values().equal(made.grid_values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(dtype):
    weight = torch.randn(8, 64).to(dtype)
    ours, theirs = alone(weight, bits=3), alone(weight.float(), bits=3)
    assert ours.dequantize().equal(theirs.dequantize())


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_any_size_of_weights_will_do(size):
    weight = torch.randn(4, 64)
    ours, theirs = alone(size * weight, bits=3), alone(weight, bits=3)
    assert ours.vectors.equal(theirs.vectors)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"bits": 7}, "bits is 7"), ({"group": 512}, "groups of 512"), ({"damping": 0.0}, "damping")],
)
def test_refuses_nonsense(options, says):
    weight, gram = problem(2, 512)
    with pytest.raises(UserError, match=says):
        pvq(weight, gram, **{"bits": 4} | options)


def test_a_model_is_written_and_read_back(llama, tmp_path):
    report = lw.compress(
        llama, tmp_path / "out", bits=3, method="pvq", format="layerwise", text="builtin",
        calibration="builtin", samples=4, text_samples=2, length=32, noise_floor=False, group=16,
    )  # fmt: skip
    assert report.proof is not None


@pytest.mark.trained
def test_a_trained_model_loses_six_tenths_of_what_it_does_by_rounding():
    found = lw.open(f"{ASSETS}/models/bytes-wikitext")
    ours = theirs = 0.0
    for layer in found.structure.layers.values():
        weight = layer.read(found.source).float()
        ours += lost(weight, alone(weight, bits=3).dequantize())
        theirs += lost(weight, rtn(weight, bits=3).dequantize())
    assert ours <= 0.6 * theirs
