"""A federation in one process: rounds of clients that learn and a server that joins them."""

import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional

from layerwise import __version__
from layerwise.core.catalogue import Method
from layerwise.core.errors import UserError
from layerwise.core.keeping.staging import Staging, arrange, check_target, stage
from layerwise.core.packing import raw_bytes
from layerwise.core.progress import Progress
from layerwise.core.reading.checkpoint import TensorInfo
from layerwise.core.telling.rounds import LAST, Federation, Global, Reply, RoundRow
from layerwise.flow.aggregating import Proxy, join
from layerwise.flow.locally import Local, judged, pooled, proxy_loss, restated, seed_of, train
from layerwise.flow.studies import Study, held_back, network, settled, shared_out

# What is wrong with a client that was told to fail.
FAULTS = ("nan", "shape", "nothing", "noise")
NOISE = 1.5  # spreads of a tensor
_HELD = "held"


@dataclass(frozen=True, slots=True)
class Clients:
    """How a federation is set up.

    Attributes:
        clients: How many share the samples.
        alpha: How unevenly: see `shared_out`.
        fraction: Share of the clients with samples that each round asks, at least two of them.
        rounds: How many there are.
        network: Of the study.
        local: How clients learn.
        proxy: Samples that the server holds back, each class alike, whatever the method.
        faults: Clients that fail every round, by number: see FAULTS.
        seed: Of everything that is drawn.
    """

    clients: int = 10
    alpha: float = 0.5
    fraction: float = 1.0
    rounds: int = 15
    network: str = "mlp"
    local: Local = field(default_factory=Local)
    proxy: int = 100
    faults: Mapping[int, str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no federation.

        Raises:
            UserError: A number is out of its range, or a fault unknown.
        """
        if self.rounds < 1 or not 0 < self.fraction <= 1:
            raise UserError(
                f"{self.rounds} rounds with {self.fraction} of the clients are none.",
                "Give at least one round, and a fraction above 0 and up to 1.",
            )
        for client, fault in (self.faults or {}).items():
            if fault not in FAULTS or not 0 <= client < self.clients:
                raise UserError(
                    f"client {client} cannot have the fault {fault!r}.",
                    f"Faults: {', '.join(FAULTS)}; clients are 0 to {self.clients - 1}.",
                )


class Federated:
    """A study among clients: what each has, and what it returns when it is asked.

    Args:
        study: Images and labels.
        setting: How they are shared and learned from.
    """

    def __init__(self, study: Study, setting: Clients) -> None:
        self.study = study
        self.setting = setting
        mine, others = held_back(study.labels, setting.proxy, setting.seed)
        self.proxy = study.images[mine], study.labels[mine]
        parts = shared_out(study.labels[others], setting.clients, setting.alpha, setting.seed)
        self.samples = [others[part] for part in parts]
        self.pool = study.images[others], study.labels[others]
        self.module = network(study, setting.network, setting.local.learning, setting.seed)
        self.learned = {name for name, _ in self.module.named_parameters()}
        self.first = settled(self.module.state_dict())

    @property
    def counts(self) -> list[int]:
        """Samples of each client."""
        return [len(part) for part in self.samples]

    def asked(self, round: int) -> list[int]:
        """The clients that a round asks; one without samples is never asked."""
        there = [client for client, count in enumerate(self.counts) if count]
        wanted = max(round_up(self.setting.fraction * len(there)), min(2, len(there)))
        random = np.random.default_rng([self.setting.seed, 3, round])
        return sorted(random.choice(there, wanted, replace=False).tolist())

    def reply(
        self,
        client: int,
        sent: Mapping[str, Tensor],
        round: int,
        kept: Mapping[str, Tensor],
        *,
        slopes: bool = False,
    ) -> Reply | None:
        """What a client returns; what is wrong with it, if it was told to fail."""
        mine, setting = self.samples[client], self.setting
        seed = seed_of(setting.seed, 4, round, client)
        reply = train(
            self.module,
            sent,
            self.study.images[mine],
            self.study.labels[mine],
            setting.local,
            round=round,
            seed=seed,
            kept=kept,
            slopes=slopes,
        )
        return faulty(reply, (setting.faults or {}).get(client, ""), seed)

    def judge(self, tensors: Mapping[str, Tensor]) -> tuple[float, float | None]:
        """Accuracy and loss of a global model on what no client has."""
        asked = self.study.test_images, self.study.test_labels
        return judged(self.module, tensors, self.pool, asked, self.setting.local.learning)

    def tried(self, tensors: Mapping[str, Tensor]) -> float:
        """Loss of a model over all clients, its batch norms restated on their samples, pooled."""
        there = [client for client, count in enumerate(self.counts) if count]
        counts = [self.counts[client] for client in there]
        shown = [self.samples[client] for client in there]
        stated = [restated(self.module, tensors, self.study.images[mine]) for mine in shown]
        self.module.load_state_dict({**settled(tensors), **pooled(stated, counts)})
        self.module.eval()
        with torch.no_grad():
            lost = [
                float(
                    functional.cross_entropy(
                        self.module(self.study.images[mine]), self.study.labels[mine]
                    )
                )
                for mine in shown
            ]
        return sum(n * loss for n, loss in zip(counts, lost, strict=True)) / sum(counts)

    def begun(self, method: Method, options: Mapping[str, Any]) -> Global:
        """What the server holds before the first round.

        For a method that begins with masks the server learns from its own samples first; all
        layers but the first and the last may be masked.
        """
        if method.begins is None:
            return Global(self.first)
        how, seed = self.setting.local, seed_of(self.setting.seed, 5)
        learned = train(self.module, self.first, *self.proxy, how, seed=seed).tensors
        wide = [name for name in self.first if name in self.learned and learned[name].dim() > 1]
        weights = {name: learned[name] for name in wide[1:-1]}
        taken = inspect.signature(method.begins).parameters

        def tried(changed: Mapping[str, Tensor]) -> float:
            return self.tried({**learned, **changed})

        states = method.begins(
            weights,
            tried,
            torch.Generator().manual_seed(seed),
            **{name: value for name, value in options.items() if name in taken},
        )
        masked = {name: weights[name] * state["kept"] for name, state in states.items()}
        return Global({**learned, **masked}, states)

    def proxy_loss(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Loss of a global model on what the server holds back."""
        return proxy_loss(self.module, tensors, *self.proxy)


def round_up(value: float) -> int:
    """The next whole number, where rounding of floats does not count."""
    return int(np.ceil(value - 1e-9))


def faulty(reply: Reply, fault: str, seed: int) -> Reply | None:
    """A reply with what a broken or hostile client makes of it; "" leaves it as it is."""
    if not fault:
        return reply
    if fault == "nothing":
        return None
    noise = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for name, tensor in reply.tensors.items():
        if not tensor.is_floating_point():
            made[name] = tensor
        elif fault == "nan":
            made[name] = torch.full_like(tensor, torch.nan)
        elif fault == "shape":
            made[name] = tensor[None]
        else:
            spread = NOISE * float(tensor.std(correction=0))
            made[name] = spread * torch.randn(tensor.shape, generator=noise)
    return Reply(made, reply.count, reply.loss, reply.grads)


def federate(
    study: Study,
    method: Method,
    options: Mapping[str, Any],
    setting: Clients,
    progress: Progress,
    *,
    out: Path | None = None,
    restart: bool = False,
) -> Federation:
    """Train a model at several clients, round by round.

    Args:
        study: Images and labels.
        method: How the server joins what clients return.
        options: Of the method.
        setting: How clients are made, and learn.
        progress: Is told of each round.
        out: Directory to make of the model; must not exist.  A run that was stopped is taken up
            after its last whole round, and ends with the same bytes.
        restart: Throw a stopped run with other options away.

    Raises:
        UserError: Something is not as it must be.
    """
    check_options(method, options)
    if out is not None:
        check_target(out)
    among = Federated(study, setting)
    own = "proxy" in method.evidence or method.begins is not None
    if own and not setting.proxy:
        raise UserError(
            f"{method.id} reads samples of the server's own, and none is held back.",
            "Hold some back: --proxy 100.",
        )
    if setting.local.learning != "supervised" and own:
        raise UserError(
            f"{method.id} reads labels, and clients learn without any.",
            "Use supervised learning, or another method.",
        )
    if out is None:
        held, rows = _rounds(
            among, method, options, progress, None, among.begun(method, options), []
        )
        return _told(among, method, options, rows, held, "")
    infos = [TensorInfo(n, t.dtype, tuple(t.shape)) for n, t in among.first.items()]
    name = _identity(among, method, options)
    with stage(out, arrange(infos), name, restart=restart) as staging:
        held, rows = _resumed(staging, among.first) or (among.begun(method, options), [])
        held, rows = _rounds(among, method, options, progress, staging, held, rows)
        if "tensors" not in staging.steps:
            for key, tensor in held.tensors.items():
                staging.write(key, tensor)
            staging.finish_step("tensors", {})
        told = _told(among, method, options, rows, held, os.fspath(out))
        content = told.as_json() | {"out": ""}  # the same bytes wherever they are made
        staging.add({"report.json": (json.dumps(content, indent=2) + "\n").encode()})
        staging.publish()
    return told


def check_options(method: Method, options: Mapping[str, Any]) -> None:
    """Refuse options that a method does not have.

    Raises:
        UserError: There is one.
    """
    if unknown := sorted(options.keys() - method.options.keys()):
        raise UserError(
            f"{method.id} has no option {unknown[0]}.",
            f"It has {', '.join(method.options) or 'none'}.",
        )


def _rounds(
    among: Federated,
    method: Method,
    options: Mapping[str, Any],
    progress: Progress,
    staging: Staging | None,
    held: Global,
    rows: list[RoundRow],
) -> tuple[Global, list[RoundRow]]:
    """The rounds that are left."""
    progress.stage("rounds", among.setting.rounds - held.done)
    proxy: Proxy | None = among.proxy_loss if "proxy" in method.evidence else None
    while held.done < among.setting.rounds:
        held, row = one_round(among, method, options, held, proxy)
        rows.append(row)
        if staging is not None:
            staging.finish_step(f"round-{held.done}", asdict(row), {_HELD: packed(held)})
        for client, why in row.excluded.items():
            progress.tell(f"round {row.round}: client {client} {why}")
        progress.step(f"{row.accuracy:.1%}")
    return held, rows


def one_round(
    among: Federated,
    method: Method,
    options: Mapping[str, Any],
    held: Global,
    proxy: Proxy | None = None,
) -> tuple[Global, RoundRow]:
    """Ask clients, join what they return, and judge what comes of it."""
    kept = {name: state["kept"] for name, state in held.states.items() if "kept" in state}
    replies = {
        client: among.reply(
            client, held.tensors, held.done, kept, slopes="grads" in method.evidence
        )
        for client in among.asked(held.done)
    }
    after, excluded = joined(among, method, options, held, replies, proxy)
    return after, row_of(after, replies, excluded, among.judge(after.tensors))


def joined(
    among: Federated,
    method: Method,
    options: Mapping[str, Any],
    held: Global,
    replies: Mapping[int, Reply | None],
    proxy: Proxy | None,
) -> tuple[Global, dict[int, str]]:
    """The global model after a round, and who was left out.

    Batch norms of a model that was made on the server's samples have their statistics.
    """
    after, excluded = join(held, replies, method, options, among.learned, proxy)
    if proxy is not None:
        fresh = restated(among.module, after.tensors, among.proxy[0])
        after = Global(fresh, after.states, after.done)
    return after, excluded


def row_of(
    held: Global,
    replies: Mapping[int, Reply | None],
    excluded: Mapping[int, str],
    found: tuple[float, float | None],
) -> RoundRow:
    """What became of a round."""
    sound = {client: reply for client, reply in replies.items() if reply and client not in excluded}
    total = sum(reply.count for reply in sound.values())
    lost = sum(reply.count * reply.loss for reply in sound.values())
    return RoundRow(
        held.done,
        sorted(sound),
        {str(client): why for client, why in excluded.items()},
        *found,
        lost / total if total else None,
    )


def packed(held: Global) -> Tensor:
    """All that the server holds, as the bytes of one file: (bytes,)."""
    named = {f"tensor/{name}": tensor for name, tensor in held.tensors.items()}
    for name, state in held.states.items():
        named |= {f"state/{name}/{part}": tensor for part, tensor in state.items()}
    whole = {name: tensor.contiguous().clone() for name, tensor in named.items()}
    content = safetensors.torch.save(whole, {"done": str(held.done)})
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def unpacked(content: Tensor, first: Mapping[str, Tensor]) -> Global:
    """What `packed` made into bytes, its tensors in the order of the model's."""
    named = safetensors.torch.load(raw_bytes(content).tobytes())
    size = int.from_bytes(raw_bytes(content)[:8].tobytes(), "little")
    header = json.loads(raw_bytes(content)[8 : 8 + size].tobytes())
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in named.items():
        kind, _, rest = key.partition("/")
        if kind == "state":
            name, _, part = rest.rpartition("/")
            states.setdefault(name, {})[part] = tensor
    tensors = {name: named[f"tensor/{name}"] for name in first}
    ordered = {name: states[name] for name in (*tensors, "") if name in states}
    return Global(tensors, ordered, int(header["__metadata__"]["done"]))


def _resumed(staging: Staging, first: Mapping[str, Tensor]) -> tuple[Global, list[RoundRow]] | None:
    """What the last whole round left; None if there was none."""
    states = staging.states()
    if states is None:
        return None
    content = states[_HELD]
    held = unpacked(content[0 : len(content)], first)
    steps = (staging.steps[f"round-{number}"]["facts"] for number in range(1, held.done + 1))
    return held, [RoundRow(**facts) for facts in steps]


def _told(
    among: Federated,
    method: Method,
    options: Mapping[str, Any],
    rows: Sequence[RoundRow],
    held: Global,
    out: str,
) -> Federation:
    last = [row.accuracy for row in rows[-LAST:]]
    faults = {str(client): fault for client, fault in (among.setting.faults or {}).items()}
    left = sum(len(row.excluded) for row in rows)
    silent = sum(not row.clients for row in rows)
    notes = [f"{left} replies were left out, for the reasons in the rows"] * bool(left)
    notes += [f"{silent} rounds changed nothing: no reply could be used"] * bool(silent)
    return Federation(
        among.study.name,
        method.name,
        dict(options),
        asdict(among.setting) | {"faults": faults},
        among.counts,
        rows,
        sum(last) / len(last),
        notes,
        out,
        held.tensors,
    )


def _identity(among: Federated, method: Method, options: Mapping[str, Any]) -> str:
    """Says what a federation is; a stopped one is only taken up by the same."""
    said = [__version__, method.id, dict(options), asdict(among.setting), among.study.name]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode())
    shown: Sequence[Any] = (among.study.images, among.study.labels)
    for tensor in (*shown, *among.first.values()):
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()
