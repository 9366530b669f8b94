"""AdaDim: groups along the inputs or along the outputs, whichever suits the layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import functional

from layerwise.core.activation import Activation
from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.packing import pack, unpack, words
from layerwise.core.results import (
    SCALE_BITS,
    SCALE_DTYPE,
    Coded,
    Layout,
    middle,
    spread,
    told_group,
)
from layerwise.core.statistics import check_statistics
from layerwise.core.symmetric import squared_lengths
from layerwise.core.verbs import quantizer
from layerwise.quantize._feedback import factorize, feed_back, round_evenly
from layerwise.quantize._grid import by_group, check_grid, encode, fit, nearest

Along = Literal["best", "inputs", "outputs"]

_OPTIONS = {"bits": 3, "group": 64}
_SOURCE = "abstract: up to 4.7% better than RTN and GPTQ on MMLU, 3 bits in groups of 128"


@dataclass(frozen=True, slots=True)
class Grouped(Coded):
    """A weight as codes on one grid per group of inputs of an output, or of outputs of an input.

    Attributes:
        codes: Grid points, in [0, 2^bits); columns are rows where groups lie along outputs.
        scale: Step of each group, in SCALE_DTYPE.
        zero: Grid point that stands for 0.0.
        outputs: Groups lie along outputs, and all of the above is of the transposed weight.
        bits: Width of one code.
        group: Weights per grid; the last group of a row may be shorter.
        symmetric: Every zero point is the middle code, so none is stored.
        input_scale: None.
        activation: How the layer's input is rounded when the model runs; None leaves it.
        notes: What the caller should know.
    """

    codes: Integer[Tensor, "rows width"]
    scale: Float[Tensor, "rows groups"]
    zero: Integer[Tensor, "rows groups"]
    outputs: bool
    bits: int
    group: int
    symmetric: bool = False
    input_scale: Float[Tensor, " in"] | None = None
    activation: Activation | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def layout(cls, rows: int, width: int, told: Mapping[str, Any]) -> Layout:
        """As many codes and grids whichever way groups lie; groups along outputs are whole."""
        bits = int(told["bits"])
        grids = rows * -(-width // told_group(told, width))
        made: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (torch.int32, (words(rows * width, bits),)),
            "scale": (SCALE_DTYPE, (grids,)),
            "outputs": (torch.bool, (1,)),
        }
        if not told["symmetric"]:
            made["zero"] = (torch.int32, (words(grids, bits),))
        return made

    def parts(self, told: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those tensors; a ragged width leaves grids over where groups lie along outputs."""
        layout = self.layout(*self.shape, told)
        left = (0, layout["scale"][1][0] - self.scale.numel())
        made = {
            "codes": pack(self.codes.reshape(1, -1), self.bits)[0],
            "scale": functional.pad(self.scale.flatten(), left),
            "outputs": torch.tensor([self.outputs]),
        }
        if not self.symmetric:
            zero = functional.pad(self.zero.flatten(), left)
            made["zero"] = pack(zero[None], self.bits)[0]
        return made

    @classmethod
    def read(
        cls, parts: Mapping[str, Tensor], rows: int, width: int, told: Mapping[str, Any]
    ) -> "Grouped":
        """What `parts` gave, but for notes and activations."""
        bits, group = int(told["bits"]), told_group(told, width)
        outputs = bool(parts["outputs"])
        shape = (width, rows) if outputs else (rows, width)
        grids = (shape[0], -(-shape[1] // group))
        held = grids[0] * grids[1]
        codes = unpack(parts["codes"][None], bits, rows * width).reshape(shape)
        scale = parts["scale"][:held].reshape(grids)
        zero = middle(scale, bits)
        if "zero" in parts:
            zero = unpack(parts["zero"][None], bits, held).reshape(grids)
        codes = codes if bits > 8 else codes.to(torch.uint8)
        return cls(codes, scale, zero, outputs, bits, group, bool(told["symmetric"]))

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of the layer."""
        first, second = self.codes.shape
        return (second, first) if self.outputs else (first, second)

    def grid_values(self) -> Float[Tensor, "out in"]:
        """The stored matrix, float32."""
        width = self.codes.shape[1]
        scale, zero = (spread(grid.float(), self.group, width) for grid in (self.scale, self.zero))
        values = (self.codes.float() - zero) * scale
        return values.T.contiguous() if self.outputs else values

    def bits_per_weight(self) -> float:
        """Codes, 16-bit scales, and zero points, per weight."""
        grid = SCALE_BITS if self.symmetric else SCALE_BITS + self.bits
        stored = self.codes.numel() * self.bits + self.scale.numel() * grid + 8
        return stored / self.codes.numel()


@quantizer(
    Paper(
        "Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of "
        "Large Language Models",
        2023,
        "2309.15531",
    ),
    claims=(
        Claim("rtn", "bytes-wikitext-outliers/quantize", _OPTIONS, 0.3, _SOURCE),
        Claim("rtn", "bytes-wikitext/quantize", _OPTIONS, 0.0, _SOURCE),
    ),
    exempt={
        "each_bit_quarters_the_loss": "a large weight of a small input coarsens those that meet "
        "large inputs, and no error is moved",
    },
    codes="own",
    stores=Grouped,
)
def adadim(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    bits: int,
    group: int = 128,
    symmetric: bool = False,
    along: str = "best",
    feedback: bool = False,
    damping: float = 0.01,
) -> Grouped:
    """Round to nearest in groups of inputs of one output, or in groups of outputs of one input.

    Large inputs meet the weights of a column.  In groups along the outputs a column has grids of
    its own, so that what its weights need does no harm to others; in groups along the inputs an
    output has.  Both are tried, and the one with less error in what the layer answers is taken:

        L(Q) = |(Q - W) X|^2 = tr((Q - W) G (Q - W)^T)                            (eq. 3)

    Inputs win a tie.  Groups along the outputs are tried where `group` divides their number, so
    that neither way takes more room.  With `feedback`, the way is chosen as before, and columns
    are then rounded as in quantize/gptq; along the outputs, a column's grids are fitted to all
    corrections made so far when its turn comes.

    Unlike the authors' code, which compares what the whole attention or MLP answers, we compare
    what this matrix does, as a method sees one layer and no module.  Where down_proj reads large
    inputs, that chooses worse for gate_proj and up_proj, whose few large rows outweigh the rest.

    Args:
        weight: Layer to quantize.
        gram: Mean of x x^T over calibration tokens.
        bits: Width of a code, from 1 to 16.
        group: Weights that share a grid.
        symmetric: Centre every grid on 0.0, so that no zero points are stored.
        along: "inputs" or "outputs" for groups that lie that way, "best" to choose.
        feedback: Move each error onto the inputs not yet rounded.
        damping: With feedback, added to the diagonal of `gram`, as a fraction of its mean.

    Returns:
        Codes and grids.  A note says where groups lie along the outputs.

    Raises:
        UserError: An option is out of range, a value is NaN or infinite, or H does not factor.
    """
    if along not in get_args(Along):
        raise UserError(f"along is {along!r}.", "Give best, inputs or outputs.")
    check_grid(weight, bits, group)
    check_statistics(gram)
    grid = _Grid(bits, group, symmetric)
    fits = len(weight) % group == 0
    if along == "outputs" and not fits:
        raise UserError(
            f"a group of {group} does not divide {len(weight)} outputs.",
            "Give one that does, or along best, which keeps to inputs there.",
        )
    ways = [False, True] if along == "best" and fits else [along == "outputs"]
    tried = [_nearest(weight, grid, outputs) for outputs in ways]
    best = min(tried, key=lambda one: _loss(one.grid_values() - weight.float(), gram))
    return _fed_back(weight, gram, grid, damping, best.outputs) if feedback else best


@dataclass(frozen=True, slots=True)
class _Grid:
    bits: int
    group: int
    symmetric: bool

    def made(
        self,
        codes: Integer[Tensor, "rows width"],
        scale: Float[Tensor, "rows groups"],
        zero: Float[Tensor, "rows groups"] | Integer[Tensor, "rows groups"],
        outputs: bool,
        notes: tuple[str, ...] = (),
    ) -> Grouped:
        """Codes and grids as they are stored."""
        return Grouped(
            codes,
            scale.to(SCALE_DTYPE),
            zero.int(),
            outputs,
            self.bits,
            self.group,
            self.symmetric,
            notes=("groups lie along the outputs", *notes) if outputs else notes,
        )


def _nearest(weight: Float[Tensor, "out in"], grid: _Grid, outputs: bool) -> Grouped:
    laid = weight.T if outputs else weight
    made = nearest(laid, grid.bits, grid.group, grid.symmetric)
    return grid.made(made.codes, made.scale, made.zero, outputs)


def _fed_back(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    grid: _Grid,
    damping: float,
    outputs: bool,
) -> Grouped:
    if not outputs:
        made = round_evenly(
            weight,
            gram,
            bits=grid.bits,
            group=grid.group,
            symmetric=grid.symmetric,
            damping=damping,
            clips=1,
        )
        return grid.made(made.codes, made.scale, made.zero, outputs, made.notes)
    factored = factorize(gram, damping)
    rounder = _Columns(weight, grid)
    feed_back(weight, factored, rounder, 1)
    codes = rounder.codes.int() if grid.bits > 8 else rounder.codes.to(torch.uint8)
    return grid.made(codes, rounder.scale, rounder.zero, outputs, factored.notes)


class _Columns:
    """Rounds a column on grids of its own, one for each group of outputs."""

    def __init__(self, weight: Float[Tensor, "out in"], grid: _Grid) -> None:
        rows, width = weight.shape
        self.grid = grid
        self.codes = torch.empty(width, rows)
        self.scale = torch.empty(width, rows // grid.group)
        self.zero = torch.empty_like(self.scale)

    def fit(self, start: int, columns: Float[Tensor, "1 out"]) -> None:
        """The ranges that hold all."""
        grouped = by_group(columns, self.grid.group)  # (1, groups, group)
        scale, zero = fit(grouped, self.grid.bits, self.grid.symmetric)
        self.scale[start], self.zero[start] = scale[0], zero[0]

    def round(self, j: int, column: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
        """The nearest points; their codes are kept."""
        scale, zero = self.scale[j], self.zero[j]  # (groups,)
        codes = encode(by_group(column[None], self.grid.group)[0], scale, zero, self.grid.bits)
        self.codes[j] = codes.flatten()
        return ((codes - zero[:, None]) * scale[:, None]).flatten()


def _loss(error: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]) -> float:
    """Mean squared error of the outputs, tr(E G E^T), summed over outputs."""
    return float(squared_lengths(error, gram).sum(dtype=torch.float64))
