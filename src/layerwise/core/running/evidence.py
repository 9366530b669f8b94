"""What calibration shows of an input, accumulated as it streams by."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from layerwise.core.catalogue import EVIDENCE, GATHERED, Method
from layerwise.core.errors import UserError
from layerwise.core.reading.structure import Layer
from layerwise.core.symmetric import add_squares, mirror

# Evidence of a layer itself and not of what it reads: it is given by the layer's name.
GRAD, SLOPES = "grad", "slopes"
BY_LAYER = frozenset({GRAD, SLOPES})


@runtime_checkable
class Watcher(Protocol):
    """Sees what a layer reads."""

    def see(self, inputs: Tensor) -> None:
        """Take in a batch of inputs, (tokens, in)."""
        ...


@runtime_checkable
class AttentionWatcher(Protocol):
    """Sees what tokens attend to."""

    def see(self, attention: Tensor) -> None:
        """Take in a batch of windows, (batch, heads, asking, tokens); rows sum to 1."""
        ...


class Collector:
    """Accumulates what methods asked for about one input.

    Args:
        layer: A layer that reads the input.
        words: Evidence wanted: any of "gram", "norm", "mean", "variance", "magnitude", "peak",
            "inputs".
    """

    def __init__(self, layer: Layer, words: frozenset[str]) -> None:
        self.layer = layer
        self.words = words
        self.tokens = 0
        self._gram = torch.zeros(layer.width, layer.width) if "gram" in words else None
        self._energy = torch.zeros(layer.width, dtype=torch.float64)
        self._moments = Moments(layer.width) if words & {"mean", "variance"} else None
        self._magnitude = torch.zeros(layer.width, dtype=torch.float64)
        self._peak = torch.zeros(layer.width)
        self._inputs: list[Tensor] = []

    def see(self, inputs: Tensor) -> None:
        """Take in a batch of inputs, (tokens, in)."""
        if inputs.shape[1] != self.layer.width:
            raise UserError(
                f"{self.layer.name} reads {inputs.shape[1]} inputs with a matrix of width "
                f"{self.layer.width}: a grouped convolution, of which no evidence is gathered.",
                "Give that layer a method that needs nothing, such as rtn.",
            )
        inputs = inputs.float()
        self.tokens += len(inputs)
        if self._gram is not None:
            self._gram = self._gram.to(inputs.device)
            add_squares(self._gram, inputs)
        if "norm" in self.words:
            self._energy += inputs.double().square().sum(dim=0).cpu()
        if self._moments is not None:
            self._moments.see(inputs)
        if "magnitude" in self.words:
            self._magnitude += inputs.abs().sum(dim=0, dtype=torch.float64).cpu()
        if "peak" in self.words and len(inputs):
            self._peak = self._peak.maximum(inputs.abs().amax(dim=0).cpu())
        if "inputs" in self.words:
            self._inputs.append(inputs.cpu())

    def evidence(self) -> Mapping[str, Any]:
        """The evidence, by word, to be asked for once.  An expert that no token reached has zeros.

        Raises:
            UserError: Another layer's input was not seen: its module multiplies in its own way.
        """
        if not self.tokens and "expert" not in self.layer.name:
            raise UserError(
                f"{self.layer.name} was not seen to multiply anything, so there is no evidence of "
                "its input.",
                "Give that layer a method that needs nothing, such as rtn.",
            )
        count = max(self.tokens, 1)
        made: dict[str, Any] = {}
        if self._gram is not None:
            # Methods compute where the weights are read to: only blocks run on another device.
            made["gram"] = self._gram.cpu().div_(count)
            mirror(made["gram"])
        if "norm" in self.words:
            made["norm"] = (self._energy / count).sqrt().float()
        if self._moments is not None:
            made["mean"], made["variance"] = self._moments.mean, self._moments.variance
        if "magnitude" in self.words:
            made["magnitude"] = (self._magnitude / count).float()
        if "peak" in self.words:
            made["peak"] = self._peak
        if "inputs" in self.words:
            made["inputs"] = torch.cat(self._inputs or [torch.zeros(0, self.layer.width)])
        return made


class Moments:
    """Adds up the mean and the variance of each entry, about the first of them.

    What is constant has a variance of exactly 0 then, however large it is.
    """

    def __init__(self, width: int) -> None:
        self.tokens = 0
        self._about = torch.zeros(width, dtype=torch.float64)
        self._sum, self._squares = self._about.clone(), self._about.clone()

    def see(self, inputs: Tensor) -> None:
        """Take in a batch of inputs, (tokens, in)."""
        if not len(inputs):
            return
        values = inputs.detach().double().cpu()
        if not self.tokens:
            self._about = values[0].clone()
        self.tokens += len(values)
        self._sum += (values - self._about).sum(dim=0)
        self._squares += (values - self._about).square().sum(dim=0)

    @property
    def mean(self) -> Tensor:
        """(in,); zeros if nothing was seen."""
        return (self._about + self._sum / max(self.tokens, 1)).float()

    @property
    def variance(self) -> Tensor:
        """(in,), over all tokens; zeros if nothing was seen."""
        count = max(self.tokens, 1)
        spread = self._squares / count - (self._sum / count).square()
        return spread.clamp(min=0).float()


class AttentionCollector:
    """Keeps the attention that each token received, over all heads and queries of a block."""

    def __init__(self) -> None:
        self._seen: list[Tensor] = []

    def see(self, attention: Tensor) -> None:
        """Take in what a batch of windows attends to, (batch, heads, asking, tokens)."""
        self._seen.append(attention.sum(dim=(1, 2)).cpu())

    def evidence(self) -> Mapping[str, Any]:
        """The evidence, (windows, length); flattened, its tokens lie as `inputs` do.

        Raises:
            UserError: No attention was seen: the block has none, or computes it in its own way.
        """
        if not self._seen:
            raise UserError(
                "no attention was seen in a block, which a method weighs tokens by.",
                "Use a method that does not, such as gptq.",
            )
        return {"attention": torch.cat(self._seen)}


class AttentionMaps:
    """Keeps what each token attends to, of one attention of a block.

    Args:
        block: The block, for messages.
    """

    def __init__(self, block: str) -> None:
        self.block = block
        self._seen: list[Tensor] = []

    def see(self, attention: Tensor) -> None:
        """Take in what a batch of windows attends to, (batch, heads, asking, tokens)."""
        self._seen.append(attention.cpu())

    def maps(self) -> Tensor:
        """(windows, heads, asking, tokens), float32; rows sum to 1.

        Raises:
            UserError: No attention was seen: the block has none, or computes it in its own way.
        """
        if not self._seen:
            raise UserError(
                f"no attention was seen in {self.block}.",
                "Use a measure that reads none, such as lim.",
            )
        return torch.cat(self._seen)


class UpdateCollector:
    """Keeps what a block adds to the residual stream, addition by addition.

    The stream is what the block is given, and then each sum of it and something else of its shape.

    Args:
        block: The block, for messages.
    """

    def __init__(self, block: str) -> None:
        self.block = block
        self._seen: list[list[Tensor]] = []
        self._stream: Tensor | None = None
        self._place = 0

    def begin(self, entering: Tensor) -> None:
        """Take note of a batch that the block is given."""
        self._stream, self._place = entering, 0

    def see(self, terms: Sequence[Any], total: Tensor) -> None:
        """Take in a sum of two terms, which may be of something else."""
        own = [place for place, term in enumerate(terms) if _same(term, self._stream)]
        if not own or not _alike(terms[1 - own[0]], self._stream):
            return
        if self._place == len(self._seen):
            self._seen.append([])
        self._seen[self._place].append(terms[1 - own[0]].float().cpu().flatten(0, -2))
        self._stream, self._place = total, self._place + 1

    def end(self, leaving: Tensor) -> None:
        """Take note of what the block answers to the batch.

        Raises:
            UserError: It is no such sum.
        """
        if not self._place or not _same(leaving, self._stream):
            raise UserError(
                f"{self.block} does not answer with what it is given and what it adds to that, so "
                "there is no residual stream to measure.",
                "Use a measure that reads none, such as lim.",
            )

    def evidence(self) -> Mapping[str, Any]:
        """What was added, one (tokens, width) for each addition in their order."""
        return {"updates": tuple(torch.cat(parts) for parts in self._seen)}


def _same(one: Any, other: Tensor | None) -> bool:
    return (
        isinstance(one, Tensor)
        and other is not None
        and one.data_ptr() == other.data_ptr()
        and one.numel() == other.numel()
    )


def _alike(one: Any, other: Tensor | None) -> bool:
    return isinstance(one, Tensor) and other is not None and one.numel() == other.numel()


@runtime_checkable
class Listener(Protocol):
    """Sees the gradients of what a layer answers."""

    def listening(self, inputs: Callable[[], Tensor]) -> Callable[[Tensor], None]:
        """What takes in the gradient of an answer, (..., out), to `inputs()`, (tokens, in).

        Whatever is made of `inputs` holds them until the gradient comes.
        """
        ...


class GradientCollector:
    """Accumulates the squared gradients of one layer's outputs.

    Attributes:
        squares: Their sum over all that was seen, (out,), float64.
    """

    def __init__(self, layer: Layer) -> None:
        self.squares = torch.zeros(layer.rows, dtype=torch.float64)

    def listening(self, inputs: Callable[[], Tensor]) -> Callable[[Tensor], None]:
        """What takes in the gradient of a batch of outputs, whatever the inputs were."""
        return self.see

    def see(self, gradient: Tensor) -> None:
        """Take in the gradient of a batch of outputs, (..., out)."""
        flat = gradient.reshape(-1, gradient.shape[-1])
        self.squares += flat.square().sum(dim=0, dtype=torch.float64).cpu()


class WeightGradientCollector:
    """Accumulates the gradient of one layer's weight: the sum of g x^T over tokens.

    Here x is what the layer reads and g the gradient of what it answers, so that no weight need
    ask for a gradient of its own.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.seen = False
        self._sum = torch.zeros(layer.rows, layer.width)

    def listening(self, inputs: Callable[[], Tensor]) -> Callable[[Tensor], None]:
        """What takes in the gradient of the outputs of these inputs."""
        return functools.partial(self.see, inputs)

    def see(self, inputs: Callable[[], Tensor], gradient: Tensor) -> None:
        """Take in a batch: its inputs, (tokens, in), and its outputs' gradient, (..., out)."""
        left, right = gradient.reshape(-1, gradient.shape[-1]), inputs().detach()
        if (left.shape[1], right.shape[1]) != self._sum.shape:
            raise UserError(
                f"{self.layer.name} reads {right.shape[1]} inputs with a matrix of width "
                f"{self.layer.width}: a grouped convolution, of which no gradient is gathered.",
                "Give that layer a method that needs nothing, such as rtn.",
            )
        self.seen = True
        self._sum = self._sum.to(left.device).addmm_(left.float().T, right.float())

    def mean(self, predicted: int) -> Tensor:
        """The gradient for each of so many predictions, to be asked for once.

        An expert that no token reached has zeros.

        Raises:
            UserError: Another layer was not seen: its module multiplies in its own way.
        """
        if not self.seen and "expert" not in self.layer.name:
            raise UserError(
                f"{self.layer.name} was not seen to multiply anything that the answer depends on, "
                "so there is no gradient of it.",
                "Give that layer a method that needs nothing, such as rtn.",
            )
        return self._sum.cpu().div_(predicted)


def calibrated_words(methods: Iterable[Method]) -> frozenset[str]:
    """The evidence that only a calibration run can give, of all that some methods read."""
    words = {word for method in methods for word in method.evidence}
    return frozenset(word for word in words if EVIDENCE[word] in GATHERED)


def of_layer(evidence: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Evidence as a method is given it: the layer's own, where there is one for each by name."""
    own = {word: evidence[word][name] for word in BY_LAYER if word in evidence}
    return {**evidence, **own} if own else evidence
