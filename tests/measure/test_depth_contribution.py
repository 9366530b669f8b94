import pytest
import torch

from layerwise.measure.depth_contribution import depth_contribution

POSITIONS = torch.arange(4).repeat(3)


def _definition(inputs, updates, positions):
    made = {"share": [], "cosine": [], "stays": [], "norm": []}
    made |= {f"{name}_{n + 1}": [] for n in range(len(updates)) for name in ("share", "cosine")}
    for token in range(len(inputs)):
        if positions[token] == 0:
            continue
        stream = before = inputs[token].double()
        for number, update in enumerate(updates, 1):
            added = update[token].double()
            made[f"share_{number}"].append(added.norm() / stream.norm())
            cosine = torch.cosine_similarity(added, stream, dim=0)
            made[f"cosine_{number}"].append(cosine)
            stream = stream + added
        total = stream - before
        made["share"].append(total.norm() / before.norm())
        made["cosine"].append(torch.cosine_similarity(total, before, dim=0))
        made["stays"].append(torch.cosine_similarity(stream, before, dim=0))
        made["norm"].append(before.norm())
    return {name: float(torch.stack(values).mean()) for name, values in made.items()}


@pytest.mark.parametrize("additions", [1, 2, 3])
def test_is_what_the_definition_says(additions):
    inputs, *updates = torch.randn(1 + additions, 12, 8)
    found = depth_contribution(inputs, updates, POSITIONS)
    assert found == pytest.approx(_definition(inputs, updates, POSITIONS), abs=1e-6)
    assert next(iter(found)) == "share"


def test_a_first_token_of_any_length_does_not_count():
    inputs, update = torch.randn(2, 12, 8)
    longer = inputs * torch.where(POSITIONS == 0, 1e6, 1.0)[:, None]
    assert depth_contribution(longer, [update], POSITIONS) == depth_contribution(
        inputs, [update], POSITIONS
    )


def test_erasing_is_below_0_and_amplifying_above():
    inputs = torch.randn(12, 8)
    erased = depth_contribution(inputs, [-inputs / 2, 0.0 * inputs], POSITIONS)
    assert erased["cosine"] == pytest.approx(-1)
    assert erased["share"] == pytest.approx(0.5)
    assert erased["share_2"] == 0
    assert depth_contribution(inputs, [inputs], POSITIONS)["cosine_1"] == pytest.approx(1)


def test_the_depth_score_is_the_centre_of_the_shares():
    from layerwise.core import catalogue

    across = catalogue.get("measure/depth_contribution").across
    records = [{"share": value} for value in (1.0, 0.0, 3.0)]
    assert across(records) == {"centre": pytest.approx(2 * 3 / 4)}
    assert across([{"share": 0.0}] * 3) == {"centre": 0.0}
