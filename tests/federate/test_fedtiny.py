import math

import pytest
import torch

import layerwise as lw
from layerwise.core import catalogue
from layerwise.core.errors import UserError
from layerwise.federate.fedavg import fedavg
from layerwise.federate.fedtiny import fedtiny
from layerwise.flow.federating import Clients, Federated
from layerwise.flow.locally import Local, pooled, restated
from layerwise.flow.studies import Study, network

COUNTS = torch.tensor([10, 30, 60])


@pytest.fixture(scope="module")
def study() -> Study:
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 1, 8, 8, generator=draw)
    labels = torch.arange(200) % 4
    images = centres[labels] + 0.3 * torch.randn(200, 1, 8, 8, generator=draw)
    return Study("centres", images[:160], labels[:160], images[160:], labels[160:], 4)


def test_what_is_given_up_and_what_grows():
    kept = torch.tensor([True, True, True, True, False, False, False, False])
    clients = torch.tensor([[4.0, -1, 3, 2, 0, 0, 0, 0]] * 3)
    grads = torch.zeros(3, 8)
    grads[0, 4], grads[1, 5], grads[2, 6] = 9.0, -5.0, 1.0  # times 0.1, 0.3, 0.6
    state = {"kept": kept, "rounds": torch.tensor(0)}
    joined = fedtiny(clients, COUNTS, grads, (0, 1), state, every=1, until=2, share=0.5)
    # half of 0.5 (1 + cos(pi / 2)) of four weights is one
    assert joined.state["kept"].tolist() == [True, False, True, True, False, True, False, False]
    assert joined.weight.tolist() == [4, 0, 3, 2, 0, 0, 0, 0]


def test_layers_take_turns_and_stop():
    kept = torch.arange(40) < 20
    clients, grads = torch.randn(3, 40), torch.randn(3, 40)
    changed = []
    for order in (0, 1):
        state = {"kept": kept, "rounds": torch.tensor(0)}
        for _ in range(8):
            before = state["kept"]
            rounds = {"every": 2, "until": 5, "share": 1.0}
            _, state = fedtiny(clients, COUNTS, grads, (order, 2), state, **rounds)
            assert int(state["kept"].sum()) == 20
            changed.append(not torch.equal(before, state["kept"]))
    assert changed == [False, True] + [False] * 6 + [False] * 3 + [True] + [False] * 4


def test_a_layer_without_a_mask_is_averaged():
    clients = torch.randn(3, 5, 6)
    joined = fedtiny(clients, COUNTS, clients, (0, 1), {})
    assert torch.equal(joined.weight, fedavg(clients, COUNTS).weight)


def test_the_pool_takes_the_candidate_that_loses_least():
    begins = catalogue.get("federate/fedtiny").begins
    weights = {"a": torch.randn(40, 10), "b": torch.randn(20, 10)}
    seen = []

    def tried(changed):
        seen.append({name: int((one != 0).sum()) for name, one in changed.items()})
        return abs(seen[-1]["b"] - 12)

    states = begins(weights, tried, torch.Generator().manual_seed(0), density=0.1, pool=12)
    assert seen[0] == {"a": 40, "b": 20}  # the first has the density everywhere
    assert all(abs(sum(one.values()) - 60) <= 1 for one in seen)
    assert len({one["b"] for one in seen}) > 3
    chosen = min(seen, key=lambda one: abs(one["b"] - 12))
    assert {name: int(state["kept"].sum()) for name, state in states.items()} == chosen
    smallest = weights["a"].abs()[states["a"]["kept"]].min()
    assert smallest >= weights["a"].abs()[~states["a"]["kept"]].max()


def test_pooled_statistics_are_those_of_all_samples(study):
    module = network(study, "cnn", "supervised", 0)
    sent = module.state_dict()
    first = "body.1.running_"
    parts = [study.images[:30], study.images[30:160]]
    stated = [restated(module, sent, part) for part in parts]
    found = pooled(stated, [30, 130])
    whole = restated(module, sent, study.images)
    assert torch.allclose(found[f"{first}mean"], whole[f"{first}mean"], atol=1e-6)
    assert torch.allclose(found[f"{first}var"], whole[f"{first}var"], rtol=2e-3)


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_masks_stay_through_the_rounds(study, density):
    told = {"rounds": 3, "epochs": 1, "clients": 3, "proxy": 16, "network": "cnn"}
    options = {"density": density, "pool": 2, "every": 1, "until": 2}
    done = lw.federate(study, method="fedtiny", options=options, **told)
    masked = ["body.3.weight", "body.6.weight"]
    sizes = {name: done.tensors[name].numel() for name in masked}
    alive = sum(int((done.tensors[name] != 0).sum()) for name in masked)
    assert alive <= math.ceil(density * sum(sizes.values())) + 1
    assert alive >= 0.8 * density * sum(sizes.values())
    assert bool((done.tensors["body.0.weight"] != 0).all())


def test_all_weights_kept_is_fedavg(study):
    setting = Clients(clients=3, proxy=16, network="cnn", local=Local(epochs=1))
    among = Federated(study, setting)
    tiny, plain = catalogue.get("federate/fedtiny"), catalogue.get("federate/fedavg")
    held = among.begun(tiny, {"density": 1.0, "pool": 1})
    from layerwise.core.telling.rounds import Global
    from layerwise.flow.federating import one_round

    ours, _ = one_round(among, tiny, {"density": 1.0, "every": 1}, held)
    theirs, _ = one_round(among, plain, {}, Global(held.tensors))
    assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in ours.tensors)


@pytest.mark.parametrize("wrong", [{"density": 0.0}, {"pool": -1}, {"every": 0}, {"share": 2.0}])
def test_refuses_what_is_no_pruning(study, wrong):
    told = {"rounds": 1, "epochs": 0, "clients": 2, "proxy": 16, "network": "cnn"}
    with pytest.raises(UserError):
        lw.federate(study, method="fedtiny", options=wrong, **told)
