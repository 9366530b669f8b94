"""The same rounds in Flower: its messages, its simulation and its servers; our methods join.

An app is three lines, which `flwr run` finds by the names in its pyproject.toml:

    from layerwise.flow.flower import client_app, server_app
    client = client_app()
    server = server_app()

What a run is told (`flwr run --run-config`, or `[tool.flwr.app.config]`) are the arguments of
`layerwise.federate` by name; options of the method are `option-NAME`.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from layerwise.core import catalogue
from layerwise.core.catalogue import Method
from layerwise.core.errors import UserError
from layerwise.core.extras import need
from layerwise.core.keeping.staging import check_target
from layerwise.core.telling.rounds import Global, Reply, RoundRow
from layerwise.flow.federating import Clients, Federated, check_options, joined, row_of
from layerwise.flow.locally import Local
from layerwise.flow.studies import study_of

_PURPOSE = "a federation in Flower"


class Joining:
    """What a Flower strategy of ours knows: who was asked, what was sent, what came of it.

    Args:
        among: The study, for its parameters' names and the server's samples.
        method: How clients are joined.
        options: Of the method.
    """

    def __init__(self, among: Federated, method: Method, options: Mapping[str, Any]) -> None:
        check_options(method, options)
        if method.begins is not None:
            raise UserError(
                f"{method.id} has masks that clients of Flower are not sent.",
                "Use layerwise.federate, or another method.",
            )
        self.among = among
        self.method = method
        self.options = options
        self.held = Global(among.first)
        self.asked: set[int] = set()
        self.rows: list[RoundRow] = []

    def take(self, replies: Mapping[int, Reply | None]) -> Mapping[str, Tensor]:
        """The global model after what came back of a round; those that are silent sent nothing."""
        proxy = self.among.proxy_loss if "proxy" in self.method.evidence else None
        every = {client: replies[client] for client in sorted(replies)}
        after, excluded = joined(self.among, self.method, self.options, self.held, every, proxy)
        judged = self.among.judge(after.tensors)
        self.rows.append(row_of(after, every, excluded, judged))
        self.held = after
        return after.tensors


def strategy(
    among: Federated, method: str, options: Mapping[str, Any] | None = None, **flower: Any
) -> Any:
    """A strategy of Flower that joins clients by one of our methods.

    Its attribute `joining` holds the rows of the rounds.

    Args:
        among: The study.
        method: How clients are joined.
        options: Of the method.
        flower: Arguments of Flower's FedAvg: fraction_train, min_available_nodes …

    Raises:
        UserError: Flower is not installed, or the method has no such option.
    """
    base: Any = need("flwr.serverapp.strategy", _PURPOSE).FedAvg
    app: Any = need("flwr.app", _PURPOSE)
    joining = Joining(among, catalogue.get(f"federate/{method}"), options or {})

    def configure_train(self: Any, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
        sent = list(base.configure_train(self, server_round, arrays, config, grid))
        joining.asked = {message.metadata.dst_node_id for message in sent}
        return sent

    def aggregate_train(self: Any, server_round: int, replies: Iterable[Any]) -> Any:
        came, nodes = replies_of(replies)
        # Who never answered has told no number of its own.
        silent = joining.asked - nodes
        found = joining.take({**came, **dict.fromkeys(silent, None)})
        row = joining.rows[-1]
        metrics = {"accuracy": row.accuracy, "excluded": len(row.excluded)}
        return app.ArrayRecord(dict(found)), app.MetricRecord(metrics)

    made: Any = type(
        f"Layerwise_{method}",
        (base,),
        {"configure_train": configure_train, "aggregate_train": aggregate_train},
    )(**{"fraction_evaluate": 0.0, **flower})
    made.joining = joining
    return made


def replies_of(messages: Iterable[Any]) -> tuple[dict[int, Reply | None], set[int]]:
    """What clients sent, by the client's own number, or its node's; and the nodes that answered."""
    found: dict[int, Reply | None] = {}
    nodes: set[int] = set()
    for message in messages:
        node = int(message.metadata.src_node_id)
        nodes.add(node)
        if message.has_error():
            found[node] = None
            continue
        metrics = next(iter(message.content.metric_records.values()), {})
        arrays = next(iter(message.content.array_records.values()), None)
        tensors: Any = {} if arrays is None else dict(arrays.to_torch_state_dict())
        count, loss = int(metrics.get("num-examples", 0)), float(metrics.get("train_loss", 0.0))
        found[int(metrics.get("client", node))] = Reply(tensors, count, loss)
    return found, nodes


def told(config: Mapping[str, Any]) -> tuple[Federated, str, dict[str, Any]]:
    """The study, the method's name and its options, of what a Flower run is told.

    Raises:
        UserError: Something told is unknown, or not as it must be.
    """
    given = {name.replace("-", "_"): value for name, value in config.items()}
    given.pop("out", None)
    options = {
        name.removeprefix("option_"): given.pop(name)
        for name in list(given)
        if name.startswith("option_")
    }
    local = {f.name: given.pop(f.name) for f in fields(Local) if f.name in given}
    faults = json.loads(given.pop("faults", "{}"))
    study, method = given.pop("study", "digits"), given.pop("method", "fedavg")
    if unknown := given.keys() - {f.name for f in fields(Clients)}:
        raise UserError(
            f"a run in Flower knows nothing of {sorted(unknown)[0]}.",
            "It takes what layerwise.federate does.",
        )
    numbered = {int(client): fault for client, fault in faults.items()}
    clients = Clients(**given, local=Local(**local), faults=numbered or None)
    return Federated(study_of(study, clients.seed), clients), method, options


def client_app() -> Any:
    """Flower's client: the samples of its partition, and what it learns from them."""
    app: Any = need("flwr.app", _PURPOSE)
    client: Any = need("flwr.clientapp", _PURPOSE).ClientApp()

    def train(message: Any, context: Any) -> Any:
        among, _, _ = told(context.run_config)
        number = int(context.node_config["partition-id"])
        sent = dict(message.content["arrays"].to_torch_state_dict())
        round = int(message.content["config"]["server-round"]) - 1
        reply = among.reply(number, sent, round, {})
        if reply is None:
            raise RuntimeError(f"client {number} was told to send nothing")
        metrics = {"client": number, "num-examples": reply.count, "train_loss": reply.loss}
        content = {
            "arrays": app.ArrayRecord(dict(reply.tensors)),
            "metrics": app.MetricRecord(metrics),
        }
        return app.Message(content=app.RecordDict(content), reply_to=message)

    client.train()(train)
    return client


def server_app() -> Any:
    """Flower's server: rounds of all clients; with `out` it leaves a directory as ours does."""
    app: Any = need("flwr.app", _PURPOSE)
    server: Any = need("flwr.serverapp", _PURPOSE).ServerApp()

    def main(grid: Any, context: Any) -> None:
        among, method, options = told(context.run_config)
        setting, out = among.setting, context.run_config.get("out", "")
        if out:
            check_target(Path(out))
        joins = strategy(
            among,
            method,
            options,
            fraction_train=setting.fraction,
            min_train_nodes=min(2, setting.clients),
            min_available_nodes=setting.clients,
        )
        joins.start(
            grid=grid,
            initial_arrays=app.ArrayRecord(dict(among.first)),
            num_rounds=setting.rounds,
        )
        if out:
            _write(Path(out), joins.joining)

    server.main()(main)
    return server


def _write(out: Path, joining: Joining) -> None:
    """The model and its rows, whole or not at all."""
    staged = out.with_name(out.name + ".partial")
    staged.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in joining.held.tensors.items()}
    safetensors.torch.save_file(tensors, staged / "model.safetensors", {"format": "pt"})
    rows = [asdict(row) for row in joining.rows]
    (staged / "rounds.json").write_text(json.dumps(rows, indent=2) + "\n")
    staged.rename(out)
