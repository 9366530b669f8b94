"""Rounds of clients in one process: who takes part, who is left out, and what a stop costs."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import layerwise as lw
from layerwise.cli import main
from layerwise.cli.parser import LOCAL
from layerwise.core.errors import UserError
from layerwise.core.telling.rounds import Reply, unsound
from layerwise.flow.federating import Clients, Federated
from layerwise.flow.locally import Local, changed, simclr_loss, train
from layerwise.flow.studies import Study, held_back, network, shared_out

SMALL = {"rounds": 3, "epochs": 1, "clients": 5, "proxy": 12}


@pytest.fixture(scope="module")
def study() -> Study:
    """Four classes of small pictures that a line tells apart."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 1, 8, 8, generator=draw)
    labels = torch.arange(240) % 4
    images = centres[labels] + 0.3 * torch.randn(240, 1, 8, 8, generator=draw)
    return Study("centres", images[:180], labels[:180], images[180:], labels[180:], 4)


def test_clients_learn_together(study):
    done = lw.federate(study, **SMALL | {"rounds": 8})
    assert [row.round for row in done.rounds] == list(range(1, 9))
    assert done.rounds[0].accuracy < done.accuracy
    assert done.accuracy > 0.9
    assert sum(done.counts) == 168


@pytest.mark.parametrize(
    ("fault", "reason"), [("nan", "NaN"), ("shape", "instead of"), ("nothing", "nothing")]
)
def test_a_broken_client_is_left_out_and_named(study, fault, reason):
    done = lw.federate(study, faults={2: fault}, **SMALL)
    assert all(reason in row.excluded["2"] for row in done.rounds)
    assert all(2 not in row.clients and len(row.clients) == 4 for row in done.rounds)
    assert all(bool(tensor.isfinite().all()) for tensor in done.tensors.values())


def test_leaving_a_client_out_is_never_having_asked_it(study):
    among = Federated(study, Clients(clients=5, proxy=12, faults={2: "nan"}))
    from layerwise.core import catalogue
    from layerwise.core.telling.rounds import Global
    from layerwise.flow.aggregating import join

    average = catalogue.get("federate/fedavg")
    replies = {client: among.reply(client, among.first, 0, {}) for client in range(5)}
    held = Global(among.first)
    after, excluded = join(held, replies, average, {}, among.learned)
    del replies[2]
    without, _ = join(held, replies, average, {}, among.learned)
    assert list(excluded) == [2]
    assert all(torch.equal(after.tensors[name], without.tensors[name]) for name in among.first)


def test_a_round_without_anybody_changes_nothing_and_goes_on(study):
    done = lw.federate(study, faults=dict.fromkeys(range(5), "nothing"), **SMALL)
    first = Federated(study, Clients(clients=5, proxy=12)).first
    assert all(torch.equal(done.tensors[name], first[name]) for name in first)
    assert "no reply" in done.notes[1]


def test_a_hostile_client_hurts_the_average(study):
    hurt, sound = (lw.federate(study, faults=faults, **SMALL) for faults in ({2: "noise"}, None))
    assert hurt.rounds[0].loss > sound.rounds[0].loss


def test_a_part_of_the_clients_each_round(study):
    done = lw.federate(study, fraction=0.4, **SMALL)
    assert all(len(row.clients) == 2 for row in done.rounds)
    assert len({tuple(row.clients) for row in done.rounds}) > 1


def test_the_seed_says_everything(study):
    one, same, other = (
        lw.federate(study, seed=seed, fraction=0.6, learning=kind, network="cnn", **SMALL)
        for seed, kind in ((1, "contrastive"), (1, "contrastive"), (2, "contrastive"))
    )
    assert all(torch.equal(one.tensors[name], same.tensors[name]) for name in one.tensors)
    assert not all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


@pytest.mark.parametrize("method", ["l_dawa", "fedadam"])
@pytest.mark.parametrize("rounds", [1, 2])
def test_a_stopped_run_ends_with_the_same_bytes(study, tmp_path, method, rounds):
    told = {**SMALL, "method": method, "network": "cnn", "faults": {1: "nan"}}
    lw.federate(study, tmp_path / "whole", **told)
    with pytest.raises(KeyboardInterrupt):
        lw.federate(study, tmp_path / "stopped", progress=Stop(rounds), **told)
    assert not (tmp_path / "stopped").exists()
    watched = Stop(9)
    lw.federate(study, tmp_path / "stopped", progress=watched, **told)
    assert watched.steps == SMALL["rounds"] - rounds
    files = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert files == ["model.safetensors", "report.json"]
    for file in files:
        whole, stopped = ((tmp_path / run / file).read_bytes() for run in ("whole", "stopped"))
        assert whole == stopped, file


class Stop:
    """Stops a run after so many rounds, as a user would."""

    def __init__(self, rounds):
        self.rounds, self.steps = rounds, 0

    def stage(self, name, steps):
        pass

    def tell(self, line):
        pass

    def step(self, what):
        self.steps += 1
        if self.steps == self.rounds:
            raise KeyboardInterrupt


def test_a_stopped_run_is_not_taken_up_by_another(study, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        lw.federate(study, tmp_path / "out", progress=Stop(1), **SMALL)
    with pytest.raises(UserError, match="other options"):
        lw.federate(study, tmp_path / "out", seed=5, **SMALL)


def test_what_is_written_is_what_was_trained(study, tmp_path):
    done = lw.federate(study, tmp_path / "out", network="cnn", **SMALL)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == done.tensors.keys()
    assert all(torch.equal(written[name], done.tensors[name]) for name in written)
    with pytest.raises(UserError, match="exists already"):
        lw.federate(study, tmp_path / "out", **SMALL)


def test_no_epoch_leaves_the_model_as_it_was(study):
    done = lw.federate(study, **SMALL | {"epochs": 0})
    first = Federated(study, Clients(clients=5, proxy=12)).first
    assert all(torch.equal(done.tensors[name], first[name]) for name in first)


def test_fedprox_holds_clients_near(study):
    module, how = network(study, "mlp", "supervised", 0), {"epochs": 10, "rate": 0.02}
    sent = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def far(proximal):
        local = Local(**how, proximal=proximal)
        reply = train(module, sent, study.images[:40], study.labels[:40], local)
        return sum(float((reply.tensors[name] - sent[name]).square().sum()) for name in sent)

    assert far(10.0) < 0.5 * far(1.0) < 0.5 * far(0.0)


def test_contrastive_learning_lowers_its_loss_without_labels(study):
    told = {**SMALL, "learning": "contrastive", "rounds": 6, "epochs": 2}
    one = lw.federate(study, **told)
    blind = dataclasses.replace(study, labels=study.labels)
    assert one.rounds[-1].local_loss < one.rounds[0].local_loss
    assert one.accuracy > 0.8
    assert one.rounds[0].loss is None
    assert lw.federate(blind, **told).accuracy == one.accuracy


def test_the_contrastive_loss_by_hand():
    views, temperature = torch.randn(6, 4), 0.3
    total = 0.0
    for place in range(6):
        alike = [
            float(torch.cosine_similarity(views[place], views[other], dim=0)) / temperature
            for other in range(6)
        ]
        others = sum(np.exp(s) for other, s in enumerate(alike) if other != place)
        total -= np.log(np.exp(alike[(place + 3) % 6]) / others) / 6
    assert float(simclr_loss(views, temperature)) == pytest.approx(total, rel=1e-5)


def test_changed_pictures_are_other_views(study):
    once, again = changed(study.images), changed(study.images)
    assert once.shape == study.images.shape
    assert not torch.equal(once, again)


def test_shares_are_a_partition_and_alpha_skews_them():
    labels = torch.arange(2000) % 10
    spread = {}
    for alpha in (0.1, 100.0):
        parts = shared_out(labels, 8, alpha, seed=3)
        assert torch.equal(torch.cat(list(parts)).sort().values, torch.arange(2000))
        table = np.array([np.bincount(labels[part], minlength=10) for part in parts])
        spread[alpha] = (table.std(axis=0) / table.mean(axis=0)).mean()
    assert spread[0.1] > 1.5
    assert spread[100.0] < 0.3


def test_what_is_held_back_has_all_classes_alike():
    labels = torch.arange(100) % 4
    mine, others = held_back(labels, 20, seed=0)
    assert np.bincount(labels[mine]).tolist() == [5, 5, 5, 5]
    assert len(others) == 80
    assert not set(mine.tolist()) & set(others.tolist())


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (None, "nothing"),
        (Reply({"a": torch.ones(2)}, 0), "no sample"),
        (Reply({}, 3), "no a"),
        (Reply({"a": torch.ones(2, dtype=torch.long)}, 3), "int64"),
        (Reply({"a": torch.ones(2), "b": torch.ones(1)}, 3), "does not have"),
        (Reply({"a": torch.tensor([1.0, torch.inf])}, 3), "infinity"),
    ],
)
def test_what_is_wrong_with_a_reply(reply, reason):
    assert reason in unsound({"a": torch.zeros(2)}, reply)
    assert unsound({"a": torch.zeros(2)}, Reply({"a": torch.ones(2)}, 1)) == ""


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 0},
        {"fraction": 0.0},
        {"alpha": 0.0},
        {"clients": 0},
        {"faults": {9: "nan"}},
        {"faults": {0: "sleepy"}},
        {"batch": 1},
        {"learning": "by heart"},
        {"rate": float("nan")},
        {"options": {"bits": 4}},
        {"network": "transformer"},
        {"proxy": 500},
        {"method": "averaging"},
    ],
    ids=str,
)
def test_refuses_what_is_no_federation(study, wrong):
    with pytest.raises(UserError):
        lw.federate(study, **SMALL | wrong)


def test_the_command_line_has_what_clients_learn_by():
    fields = {f.name: f.default for f in dataclasses.fields(Local)}
    assert {name: default for name, default, _ in LOCAL} == fields


def test_the_library_has_the_defaults_of_the_loop():

    told = {f.name: f.default for f in dataclasses.fields(Clients) if f.name != "local"}
    from layerwise import api

    asked = inspect.signature(api.federate).parameters
    assert {name: asked[name].default for name in told} == told


def test_from_the_command_line(tmp_path, capsys):
    pytest.importorskip("sklearn")
    told = ["--rounds", "1", "--epochs", "1", "--clients", "3", "--fault", "0=nan"]
    out = str(tmp_path / "out")
    line = ["federate", "digits", "--method", "l_dawa", "--l_dawa-warmup", "2", *told]
    assert main([*line, "-o", out, "--json"]) == 0
    seen = capsys.readouterr()
    assert '"warmup": 2' in seen.out
    assert "client 0 sent NaN" in seen.err
    assert main([*line, "--fault", "x"]) == 2
