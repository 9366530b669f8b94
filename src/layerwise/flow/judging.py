"""One model in memory into which others' weights are put, to see what each of them loses."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwise.core.errors import UserError
from layerwise.core.reading.checkpoint import Checkpoint, ModuleSource, Source
from layerwise.core.reading.text import Text, Windows, windows
from layerwise.core.running.products import located
from layerwise.flow.assessing import load_or_say
from layerwise.flow.loading import answers

# What a module loses, in the user's own words.
Loss = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Judge:
    """A model that can be given any tensors, and what it is judged on.

    Attributes:
        model: The model, in float32 and in evaluation mode.
        places: Its parameters and buffers, by the tensors' names in the files.
        texts: What it reads, for a language model.
        loss: What judges it instead.
    """

    model: nn.Module
    places: Mapping[str, Tensor]
    texts: Sequence[Windows]
    loss: Loss | None = None

    @property
    def labels(self) -> list[str]:
        """What each loss is on."""
        return [text.label for text in self.texts] if self.loss is None else ["loss"]

    @property
    def tokens(self) -> list[int]:
        """How much each loss is a mean over."""
        return [text.ids[:, 1:].numel() for text in self.texts] if self.loss is None else [0]

    def put(self, state: Mapping[str, Tensor]) -> None:
        """Give the model other tensors; those not named stay."""
        with torch.no_grad():
            for name in state:
                self.places[name].copy_(state[name].reshape(self.places[name].shape))

    def losses(self) -> list[float]:
        """What the model loses on each text, nats per predicted token, or as the user judges."""
        if self.loss is not None:
            return [float(self.loss(self.model))]
        return [_loss(self.model, text.ids) for text in self.texts]


def _loss(model: nn.Module, ids: Tensor) -> float:
    total, start = 0.0, 0
    for logits in answers(model, ids):
        shown = ids[start : start + len(logits)]
        scored, wanted = logits[:, :-1].float().flatten(0, 1), shown[:, 1:].flatten()
        total += float(functional.cross_entropy(scored, wanted, reduction="sum"))
        start += len(logits)
    return total / ids[:, 1:].numel()


def judge_of(
    source: Source,
    texts: Sequence[Text],
    loss: Loss | None,
    *,
    samples: int,
    length: int,
    trust_remote_code: bool = False,
) -> Judge | None:
    """What judges models like this one; None if there is nothing to judge them on.

    Raises:
        UserError: A text cannot be read, the model cannot be loaded, or it keeps its tensors in
            another way than its files do.
    """
    if not texts and loss is None:
        return None
    if isinstance(source, ModuleSource):
        if loss is None:
            raise UserError(
                f"{source.label} is a module in memory, which reads no text.",
                "Give loss=, a function of a module that says what it loses.",
            )
        model = copy.deepcopy(source.module).eval()
        return Judge(model, dict(model.state_dict(keep_vars=True)), (), loss)
    assert isinstance(source, Checkpoint)
    read = [windows(source, one, samples=samples, length=length, role="heldout") for one in texts]
    model = load_or_say(source, torch.float32, trust_remote_code)
    held = model.state_dict(keep_vars=True)
    places: dict[str, Tensor] = {}
    for name in source.tensors:
        place = held.get(name, held.get(located(model, name)))
        if place is None:
            raise UserError(
                f"{type(model).__name__} keeps no tensor such as {name} of {source.label}, so "
                "other weights cannot be tried in it.",
                "Leave out --text and --fit; `layerwise evaluate` judges the result by itself.",
            )
        places[name] = place
    return Judge(model, places, read)
