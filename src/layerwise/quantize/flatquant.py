"""FlatQuant: learn to transform each layer's input, and undo it in the weight, before rounding."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.activation import Activation
from layerwise.core.catalogue import Claim, Paper
from layerwise.core.learning import Learned, Schedule, learned_alone, rounded
from layerwise.core.results import SCALE_DTYPE, Coded, Layout, Quantized, integer_product
from layerwise.core.rewriting.rotation import closest_pair, random_orthogonal
from layerwise.core.statistics import check_statistics
from layerwise.core.verbs import quantizer
from layerwise.quantize._grid import by_group, check_grid, pack, span, storable
from layerwise.quantize._rounding import check_schedule

_TOP = 7  # the largest code of an input, which has 4 bits
_ALPHA = 0.3  # the part of inputs in what the diagonal starts from
_LEAST = 1e-5  # of the largest weight or input, what one counts as at least
_CLIP = 4.0  # sigmoid of it is 0.982
_TRANSFORM_RATE, _CLIP_RATE = 5e-3, 5e-2
# From here on rounding loses less than clipping 1.8% of a range would.
_FINE_BITS = 8
# The least singular value of a factor: far above what storing it in 16 bits moves it by.
_LEAST_SINGULAR = 0.01
_TINY = torch.finfo(torch.float32).tiny

_OPTIONS = {"bits": 4, "group": 0, "symmetric": True, "activation": "int4"}
_TURNED = {**_OPTIONS, "rotate": "hadamard"}
_SOURCE = "table 1: W4A4 with weights rounded to nearest, LLaMA-2 and LLaMA-3"


@dataclass(frozen=True, slots=True)
class FlatQuantized(Coded):
    """The codes of W diag(1/s) P^-T, and what the layer's input is to be multiplied by: diag(s) P.

    Attributes:
        flat: Those codes.
        left: P1 of P = P1 ⊗ P2, in SCALE_DTYPE as all the rest.
        right: P2.
        diagonal: s.
        share: What part of max |x diag(s) P| of a token the largest code stands for, (1,).
        bits: Width of one code.
        input_scale: None.
        activation: How the transformed input is rounded when the model runs; None leaves it.
        notes: What the caller should know.
    """

    flat: Quantized
    left: Float[Tensor, "a a"]
    right: Float[Tensor, "b b"]
    diagonal: Float[Tensor, " in"]
    share: Float[Tensor, "1"]
    bits: int
    input_scale: Float[Tensor, " in"] | None = None
    activation: Activation | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def layout(cls, rows: int, width: int, told: Mapping[str, Any]) -> Layout:
        """Those of the codes, two factors, a diagonal and a share."""
        first, second = closest_pair(width)
        made: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "left": (SCALE_DTYPE, (first, first)),
            "right": (SCALE_DTYPE, (second, second)),
            "diagonal": (SCALE_DTYPE, (width,)),
            "share": (SCALE_DTYPE, (1,)),
        }
        return {**Quantized.layout(rows, width, told), **made}

    def parts(self, told: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those tensors."""
        made = {"left": self.left, "right": self.right}
        return self.flat.parts(told) | made | {"diagonal": self.diagonal, "share": self.share}

    @classmethod
    def read(
        cls, parts: Mapping[str, Tensor], rows: int, width: int, told: Mapping[str, Any]
    ) -> "FlatQuantized":
        """What `parts` gave, but for notes and activations."""
        flat = Quantized.read(parts, rows, width, told)
        own = [parts[name] for name in ("left", "right", "diagonal", "share")]
        return cls(flat, *own, bits=flat.bits)

    def grid_values(self) -> Float[Tensor, "out in"]:
        """The weight in the basis of the layer's own input: W' P^T diag(s)."""
        left, right = self.left.float(), self.right.float()
        return _kronecker(self.flat.grid_values(), left.T, right.T) * self.diagonal.float()

    def bits_per_weight(self) -> float:
        """Everything stored, per weight; layers that read one input have a transform each."""
        own = (self.left, self.right, self.diagonal, self.share)
        stored = sum(part.numel() * 8 * part.element_size() for part in own)
        return self.flat.bits_per_weight() + stored / self.flat.codes.numel()

    def answer(self, inputs: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        """The input is transformed, rounded, and multiplied by the codes, as whole numbers."""
        device, flat = inputs.device, self.flat
        left, right = self.left.float().to(device), self.right.float().to(device)
        flattened = _kronecker(inputs * self.diagonal.float().to(device), left, right)
        if self.activation is None:
            return flattened @ flat.grid_values().to(device).T
        codes, step = _codes(flattened, self.share.float().to(device))
        if self.bits > 8:
            return step * (codes @ flat.grid_values().to(device).T)
        return step * integer_product(codes, flat.codes, flat.zero, flat.scale, flat.group)


def _kronecker(
    rows: Float[Tensor, "rows in"], left: Float[Tensor, "a a"], right: Float[Tensor, "b b"]
) -> Float[Tensor, "rows in"]:
    """Row vectors times left ⊗ right, as two small products: left^T X right for each, (a, b)."""
    first, second = len(left), len(right)
    once = (rows.reshape(-1, second) @ right).reshape(-1, first, second)
    twice = once.transpose(1, 2).reshape(-1, first) @ left  # (rows b, a)
    return twice.reshape(-1, second, first).transpose(1, 2).flatten(1)


def _codes(
    inputs: Float[Tensor, "tokens in"], share: Float[Tensor, "1"]
) -> tuple[Float[Tensor, "tokens in"], Float[Tensor, "tokens 1"]]:
    """4-bit codes of inputs, and the step of each token: share max |x| / 7."""
    step = (inputs.abs().amax(dim=-1, keepdim=True) * share / _TOP).clamp(min=_TINY)
    return rounded(inputs / step).clamp(-_TOP - 1, _TOP), step


class _Transform:
    """What is learned of an input, whatever layers read it.

    Args:
        peaks: Largest weight that each input meets.
        seen: Largest magnitude of each input.
        seed: What the factors are drawn from.
    """

    def __init__(self, peaks: Float[Tensor, " in"], seen: Float[Tensor, " in"], seed: int) -> None:
        self.peaks, self.seen = peaks, seen
        generator = torch.Generator().manual_seed(seed)
        self.left, self.right = (
            random_orthogonal(size, generator).float().requires_grad_()
            for size in closest_pair(len(peaks))
        )
        self.diagonal = self._start().requires_grad_()
        self.share = torch.full((1,), _CLIP).requires_grad_()

    def meet(self, others: "Sequence[_Transform]") -> None:
        """Take in what other layers that read the input make of it."""
        self.peaks = torch.stack([self.peaks, *(other.peaks for other in others)]).amax(dim=0)
        with torch.no_grad():
            self.diagonal.copy_(self._start())

    def _start(self) -> Float[Tensor, " in"]:
        # No weight and no input is counted as 0; none has a size of its own.
        weights, inputs = (
            (values / values.amax().clamp(min=_TINY)).clamp(min=_LEAST)
            for values in (self.peaks, self.seen)
        )
        start = (1 - _ALPHA) * weights.log() - _ALPHA * inputs.log()
        return start - start.mean()

    def settle(self) -> None:
        """Keep both factors far from singular."""
        with torch.no_grad():
            for factor in (self.left, self.right):
                if torch.linalg.svdvals(factor)[-1] < _LEAST_SINGULAR:
                    first, values, second = torch.linalg.svd(factor)
                    factor.copy_((first * values.clamp(min=_LEAST_SINGULAR)) @ second)

    def stored(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """P1, P2, s and the share, as they are stored."""
        values = (self.left, self.right, self.diagonal.exp(), self.share.sigmoid())
        left, right, diagonal, share = (
            value.to(SCALE_DTYPE).float().detach() + (value - value.detach()) for value in values
        )
        return left, right, diagonal, share


class FlatQuant(Learned):
    """A layer whose transform is being learned; the arguments are those of `flatquant`."""

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        gram: Float[Tensor, "in in"] | None = None,
        peak: Float[Tensor, " in"] | None = None,
        *,
        bits: int,
        group: int = 128,
        symmetric: bool = False,
        steps: int = 150,
        batch: int = 8,
        seed: int = 0,
    ) -> None:
        check_schedule(steps, batch)
        check_grid(weight, bits, group)
        self.original = weight.float()
        self.bits, self.group, self.symmetric = bits, group, symmetric
        self.schedule = Schedule(steps, batch)
        peaks = self.original.abs().amax(dim=0)
        storable(peaks)  # refuses what is not finite
        self.transform = _Transform(peaks, torch.ones_like(peaks) if peak is None else peak, seed)
        grids = by_group(self.original, group).shape[:2]
        self.clip = torch.full((2, *grids), _CLIP).requires_grad_()

    def parameters(self) -> dict[float, list[Tensor]]:
        """The factors and the diagonal; how much of the range of weights and inputs is kept."""
        own = self.transform
        clips = [own.share] if self.bits >= _FINE_BITS else [own.share, self.clip]
        return {_TRANSFORM_RATE: [own.left, own.right, own.diagonal], _CLIP_RATE: clips}

    def share(self, others: Sequence[Learned]) -> None:
        """Have them learn one transform with this."""
        layers = [cast("FlatQuant", other) for other in others]
        self.transform.meet([layer.transform for layer in layers])
        for layer in layers:
            layer.transform = self.transform

    def settle(self) -> None:
        """The transform stays invertible."""
        self.transform.settle()

    def weight(self) -> Float[Tensor, "out in"]:
        """What the present codes stand for, in the basis of the layer's own input."""
        left, right, diagonal, _ = self.transform.stored()
        return _kronecker(self._values(left, right, diagonal), left.T, right.T) * diagonal

    def answering(self) -> Callable[[Tensor], Tensor]:
        """The product of inputs that are transformed and rounded with what codes stand for."""
        left, right, diagonal, share = self.transform.stored()
        values = self._values(left, right, diagonal)

        def answer(inputs: Tensor) -> Tensor:
            codes, step = _codes(_kronecker(inputs * diagonal, left, right), share)
            return step * (codes @ values.T)

        return answer

    def stand_in(self) -> Float[Tensor, "out in"]:
        """The weight as it was."""
        return self.original

    def coded(self) -> FlatQuantized:
        """The present codes, and the transform."""
        with torch.no_grad():
            left, right, diagonal, share = self.transform.stored()
            codes, scale, zero = self._parts(left, right, diagonal)
        flat = pack(
            codes.flatten(1),
            scale,
            zero,
            width=self.original.shape[1],
            bits=self.bits,
            group=self.group,
            symmetric=self.symmetric,
        )
        own = [part.to(SCALE_DTYPE) for part in (left, right, diagonal, share)]
        return FlatQuantized(flat, *own, bits=self.bits, activation=Activation("int4"))

    def _values(self, left: Tensor, right: Tensor, diagonal: Tensor) -> Float[Tensor, "out in"]:
        """What codes stand for before the transform is undone."""
        codes, scale, zero = self._parts(left, right, diagonal)
        values = (codes - zero[..., None]) * scale[..., None]
        return values.flatten(1)[:, : self.original.shape[1]].contiguous()

    def _parts(
        self, left: Tensor, right: Tensor, diagonal: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of W diag(1/s) P^-T, scales and zero points."""
        left, right = (torch.linalg.inv(factor.double()).T.float() for factor in (left, right))
        grouped = by_group(_kronecker(self.original / diagonal, left, right), self.group)
        kept = torch.ones(2) if self.bits >= _FINE_BITS else self.clip.sigmoid()
        low = grouped.amin(dim=-1).clamp(max=0) * kept[0]
        high = grouped.amax(dim=-1).clamp(min=0) * kept[1]
        scale, zero = span(low, high, self.bits, self.symmetric)
        codes = rounded(grouped / scale[..., None]) + zero[..., None]
        return codes.clamp(0, 2**self.bits - 1), scale, zero


@quantizer(
    Paper("FlatQuant: Flatness Matters for LLM Quantization", 2024, "2410.09426"),
    claims=(
        Claim("rtn", "bytes-wikitext/quantize", _OPTIONS, 0.7, _SOURCE),
        Claim("rtn", "bytes-wikitext-outliers/quantize", _OPTIONS, 0.9, _SOURCE),
        Claim("rtn", "bytes-wikitext/quantize", _TURNED, 0.3, _SOURCE),
        Claim("rtn", "bytes-wikitext-outliers/quantize", _TURNED, 0.9, _SOURCE),
    ),
    exempt={"pruned_weights_stay_zero": "weights are rounded in another basis"},
    codes="own",
    stores=FlatQuantized,
    activates="int4",
    learns=FlatQuant,
    unit="block",
)
def flatquant(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    peak: Float[Tensor, " in"],
    *,
    bits: int,
    group: int = 128,
    symmetric: bool = False,
    steps: int = 150,
    batch: int = 8,
    seed: int = 0,
) -> Coded:
    """Learn a transform of each input that flattens it and the weights it meets; round both.

    A layer's answer stays what it is if its input is multiplied by an invertible matrix and its
    weight by the inverse.  With one of two small factors, and a diagonal,

        Y = (X diag(s) P) (W diag(1/s) P^-T)^T,   P = P1 ⊗ P2                          (eq. 2, 5)
        x (P1 ⊗ P2) = P1^T [x] P2   with x as a matrix [x] of a rows and b columns      (eq. 3)

    both sides are rounded, to `bits` with a scale for each group of a row, and to 4 bits with a
    scale for each token.  P1, P2, s, and how much of each range is kept, sigmoid(c), are learned:

        min over P1, P2, s, c of || F(X) - F'(X; P1, P2, s, c) ||^2                        (eq. 4)

    where F is a block and F' the same block with all of its layers transformed and rounded.
    Rounding passes gradients on as they come.  a b is the pair of factors of the width that are
    closest to each other.  P1 and P2 start as random orthogonal matrices, c as 4, s as
    max|W_j|^0.7 / max|X_j|^0.3, for each input j.  Adam moves c by a rate of 0.05 and the others by
    0.005, which fall along a cosine.  Layers that read one input learn one transform, and each
    stores a copy.  A layer alone is learned from tokens drawn from a Gaussian with its gram matrix.

    Unlike the authors' code, factors are free matrices whose inverses are computed in float64, not
    U diag(d) V^T, and no singular value falls below 0.01; the logarithm of s is learned, which
    keeps it positive; parameters are learned as the 16 bits that they are stored in, so that the
    inverse is that of what is stored; s is not folded into what feeds the layer; a width that is
    twice an odd number has factors, where their search for them never ends; weights of 8 bits and
    more are not clipped.  Unlike the paper, a block sees what the quantized blocks before it
    answer, unless the caller gives others; it takes 150 steps of 8 windows, not 480 of 4; and keys,
    values and the heads' axis of what attention answers have no transforms of their own.

    Args:
        weight: Layer to quantize.
        gram: Mean of x x^T over calibration tokens; of use where the layer is learned alone.
        peak: Largest |x| of each input over calibration tokens.
        bits: Width of a weight's code, from 1 to 16.
        group: Transformed inputs that share a grid; in the paper it is the whole row.
        symmetric: Centre every grid on 0.0, so that no zero points are stored.
        steps: Updates; 0 keeps the random transform.
        batch: Windows that each update sees.
        seed: What the first transform is drawn from.

    Returns:
        Codes of the transformed weight, and the transform.

    Raises:
        UserError: An option is out of range, or a value is NaN or infinite.
    """
    check_statistics(gram, peak)
    layer = FlatQuant(
        weight,
        peak=peak.float(),
        bits=bits,
        group=group,
        symmetric=symmetric,
        steps=steps,
        batch=batch,
        seed=seed,
    )
    return learned_alone(layer, weight, gram)
