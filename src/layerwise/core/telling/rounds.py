"""What goes between a server and its clients, and what a federation has to tell."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

# What a method keeps of one tensor.
State = Mapping[str, Tensor]
LAST = 3  # rounds whose accuracies are averaged: a single one swings where clients are skewed


@dataclass(frozen=True, slots=True)
class Reply:
    """What a client returns.

    Attributes:
        tensors: Its model, by name.
        count: Samples it learned from.
        loss: Its mean loss over its last epoch.
        grads: Gradients that the method asked for, by name.
    """

    tensors: Mapping[str, Tensor]
    count: int
    loss: float = 0.0
    grads: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True, slots=True)
class Global:
    """What the server holds between two rounds.

    Attributes:
        tensors: The model, by name.
        states: What the method keeps of each tensor, by the tensor's name and its own.
        done: Rounds that are done.
    """

    tensors: Mapping[str, Tensor]
    states: Mapping[str, State] = field(default_factory=dict[str, State])
    done: int = 0


@dataclass(frozen=True, slots=True)
class RoundRow:
    """What became of one round.

    Attributes:
        round: Its number, from 1.
        clients: Those whose replies were joined.
        excluded: Those whose replies were not, with the reason.
        accuracy: Of the global model, on images that no client has.
        loss: Mean cross-entropy of the global model on them; None without labels.
        local_loss: What clients told of their own, by samples; None if nobody did.
    """

    round: int
    clients: Sequence[int]
    excluded: Mapping[str, str]
    accuracy: float
    loss: float | None
    local_loss: float | None


@dataclass(frozen=True, slots=True)
class Federation:
    """A model that several clients trained together.

    Attributes:
        study: What it was trained on.
        method: How clients were joined.
        options: Of that method.
        setting: How clients were made and trained.
        counts: Samples of each client.
        rounds: One row each.
        accuracy: Mean over the last three rounds.
        notes: What else the reader should know.
        out: Where the model is; "" if it was not kept.
    """

    study: str
    method: str
    options: Mapping[str, Any]
    setting: Mapping[str, Any]
    counts: Sequence[int]
    rounds: Sequence[RoundRow]
    accuracy: float
    notes: Sequence[str] = ()
    out: str = ""
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)

    def as_json(self) -> dict[str, Any]:
        """The fields by name, all the way down; the tensors are in the model's file."""
        told = {name: getattr(self, name) for name in self.__dataclass_fields__}
        del told["tensors"]
        return told | {"rounds": [asdict(row) for row in self.rounds]}


def unsound(sent: Mapping[str, Tensor], reply: Reply | None) -> str:
    """Why a reply cannot be joined with others; "" if it can.

    Args:
        sent: What the client was sent.
        reply: What came back; None if nothing did.
    """
    if reply is None:
        return "sent nothing"
    if reply.count < 1:
        return "learned from no sample"
    if unknown := sorted(reply.tensors.keys() - sent.keys()):
        return f"sent {unknown[0]}, which the model does not have"
    found = (_wrong(name, tensor, reply.tensors.get(name)) for name, tensor in sent.items())
    return next((reason for reason in found if reason), "")


def _wrong(name: str, sent: Tensor, came: Tensor | None) -> str:
    if came is None:
        return f"sent no {name}"
    if came.shape != sent.shape:
        return f"sent {name} of {tuple(came.shape)} instead of {tuple(sent.shape)}"
    if came.is_floating_point() != sent.is_floating_point():
        return f"sent {name} as {came.dtype} instead of {sent.dtype}"
    if came.is_floating_point() and not bool(torch.isfinite(came).all()):
        return f"sent NaN or infinity in {name}"
    return ""
