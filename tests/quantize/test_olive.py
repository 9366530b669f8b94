import os

import pytest
import torch

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.plan import LayerPlan
from layerwise.quantize._grid import storable
from layerwise.quantize.olive import Pairs, olive

ASSETS = os.environ.get("LAYERWISE_ASSETS", "")

NORMAL = {"int": [0, 4, 8, 12, 16, 20, 24, 28], "flint": [0, 2, 4, 6, 8, 12, 16, 32]}
OUTLIERS = [2**e * (1 + m / 2) for e in (5, 6, 7, 8) for m in (0, 1)][1:]


def tailed(rows=24, width=160):
    weight = torch.randn(rows, width) / 10
    weight[torch.rand(rows, width) < 0.003] *= 8
    return weight


def lost(weight, restored):
    return float((restored - weight).square().sum() / weight.square().sum())


def by_definition(row, scale, kind):
    """Each pair as it is encoded, by looking at every value."""
    sizes = NORMAL[kind] + OUTLIERS
    values = sorted({sign * size for size in sizes for sign in (-1, 1)})
    nearest = [min(values, key=lambda v: (abs(w / scale - v), -v)) for w in row]
    for left in range(0, len(row) - 1, 2):
        one, other = nearest[left : left + 2]
        if max(abs(one), abs(other)) > 32:
            nearest[left + (abs(one) >= abs(other))] = 0
    return [value * scale for value in nearest]


@pytest.mark.parametrize("kind", ["int", "flint"])
@pytest.mark.parametrize("width", [40, 41, 1])
def test_matches_the_definition(kind, width):
    weight = tailed(6, width)
    made = olive(weight, grid=kind)
    for row, scale, ours in zip(weight, made.scale, made.dequantize(), strict=True):
        theirs = by_definition(row.tolist(), float(scale[0]), kind)
        torch.testing.assert_close(ours, torch.tensor(theirs))


@pytest.mark.parametrize("kind", ["int", "flint"])
def test_the_scale_is_the_best_of_those_tried(kind):
    weight = tailed(8, 64)
    made = olive(weight, grid=kind)
    for row, scale in zip(weight, made.scale, strict=True):
        mean, three = row.mean(), 3 * row.std(correction=0)
        reach = torch.maximum((mean + three).abs(), (mean - three).abs()) / NORMAL[kind][-1]
        scales = [float(storable(reach * i / 100)) for i in range(75, 250, 2)]
        errors = [lost(row, torch.tensor(by_definition(row.tolist(), s, kind))) for s in scales]
        reached = lost(row, torch.tensor(by_definition(row.tolist(), float(scale[0]), kind)))
        assert reached == pytest.approx(min(errors), rel=1e-4)


def test_outliers_are_a_four_bit_float_in_units_of_a_normal_step():
    steps = [size / 4 for size in OUTLIERS]
    assert steps == [12, 16, 24, 32, 48, 64, 96]


def test_a_pair_holds_one_outlier_and_then_the_other_is_zero():
    made = olive(tailed(48, 256) ** 3)
    pairs = made.dequantize() / made.scale.float()
    pairs = pairs.reshape(-1, 2)
    far = pairs.abs() > 40
    assert bool(far.any())
    assert int(far.sum(dim=1).max()) == 1
    assert bool((pairs[far.any(dim=1)][~far[far.any(dim=1)]] == 0).all())


def test_the_larger_of_two_outliers_survives():
    weight = torch.randn(1, 512) / 100
    weight[0, :4] = torch.tensor([1.0, 2.0, 2.0, -1.0])
    restored = olive(weight).dequantize()[0]
    assert restored[:4].abs().gt(0).tolist() == [False, True, True, False]


def test_pairs_may_change_places_but_not_what_is_in_them():
    weight = tailed()
    shuffled = torch.randperm(80)
    swapped = weight.reshape(24, 80, 2)[:, shuffled].reshape(24, 160)
    ours = olive(swapped).dequantize().reshape(24, 80, 2)
    torch.testing.assert_close(ours, olive(weight).dequantize().reshape(24, 80, 2)[:, shuffled])
    mirrored = olive(weight.reshape(24, 80, 2).flip(2).reshape(24, 160)).dequantize()
    torch.testing.assert_close(
        mirrored.reshape(24, 80, 2).flip(2).reshape(24, 160), olive(weight).dequantize()
    )


def test_without_outliers_it_is_the_plain_grid():
    weight = torch.rand(8, 64) - 0.5
    made = olive(weight, grid="int")
    scale = made.scale.float() * 4
    assert not bool((made.codes == 8).any())
    plain = (weight / scale).round().clamp(-7, 7) * scale
    torch.testing.assert_close(made.dequantize(), plain)


def test_both_takes_the_better_grid():
    for weight in (tailed(), torch.rand(8, 64) - 0.5, torch.randn(8, 64) ** 3):
        errors = {kind: lost(weight, olive(weight, grid=kind).dequantize()) for kind in NORMAL}
        both = olive(weight)
        assert lost(weight, both.dequantize()) == pytest.approx(min(errors.values()))
        assert both.notes == (f"{min(errors, key=errors.__getitem__)} magnitudes",)


@pytest.mark.parametrize("shape", [(1, 64), (5, 61), (48, 1), (3, 2)])
@pytest.mark.parametrize("grid", ["int", "flint", "both"])
def test_what_is_stored_is_read_back(shape, grid):
    rows, width = shape
    weight = torch.randn(shape) ** 3
    made = olive(weight, grid=grid)
    told = LayerPlan(4, 0, True, "olive").told({})
    parts, layout = made.parts(told), Pairs.layout(rows, width, told)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == dict(layout)
    assert Pairs.read(parts, rows, width, told).grid_values().equal(made.grid_values())


def test_four_bits_a_weight_and_nothing_beside():
    made = olive(torch.randn(32, 256), group=64)
    assert made.bits_per_weight() == 4 + 16 / 64 + 8 / (32 * 256)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(dtype):
    weight = tailed().to(dtype)
    assert olive(weight).dequantize().equal(olive(weight.float()).dequantize())


def test_rows_without_spread_are_kept():
    weight = torch.zeros(3, 16)
    weight[1] = 0.25
    restored = olive(weight).dequantize()
    assert not restored[0].any()
    torch.testing.assert_close(restored, weight, rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"bits": 8}, "bits"), ({"group": 15}, "pair"), ({"grid": "e2m1"}, "grid")],
)
def test_refuses_nonsense(options, says, request):
    # The annotation refuses what is no grid first, in tests alone.
    expected = TypeError if says == "grid" else UserError
    with pytest.raises((expected, UserError), match=says):
        olive(torch.randn(4, 64), **options)


def test_a_model_is_written_and_read_back(llama, tmp_path):
    report = lw.compress(
        llama, tmp_path / "out", bits=4, method="olive", format="layerwise", text="builtin",
        text_samples=2, length=32, noise_floor=False,
    )  # fmt: skip
    assert report.proof is not None
    assert all("magnitudes" in row.notes[0] for row in report.layers)


def clipped(weight):
    """A plain 4-bit grid, its range searched as that of pairs is."""
    mean, three = weight.mean(dim=1), 3 * weight.std(dim=1, correction=0)
    reach = torch.maximum((mean + three).abs(), (mean - three).abs())
    best, least = weight, torch.full((len(weight), 1), torch.inf)
    for hundredths in range(75, 250, 2):
        scale = (reach * hundredths / 700)[:, None]
        tried = (weight / scale).round().clamp(-7, 7) * scale
        error = (tried - weight).square().sum(dim=1, keepdim=True)
        best, least = tried.where(error < least, best), torch.minimum(error, least)
    return best


@pytest.mark.trained
@pytest.mark.parametrize(("times", "at_most"), [(1, 1.1), (8, 0.5)])
def test_pairs_halve_the_error_of_heavy_tails_and_cost_others_nothing(times, at_most):
    found = lw.open(f"{ASSETS}/models/bytes-wikitext")
    ours = theirs = 0.0
    for layer in found.structure.layers.values():
        weight = layer.read(found.source).float()
        weight = weight.where(torch.rand(weight.shape) > 0.003, times * weight)
        ours += lost(weight, olive(weight, grid="int").dequantize())
        theirs += lost(weight, clipped(weight))
    assert ours <= at_most * theirs
