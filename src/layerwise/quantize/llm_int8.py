"""LLM.int8(): 8-bit weights and inputs, but for the few inputs that are large."""

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
    integer_product,
    middle,
    outlier_room,
    spread,
    told_group,
)
from layerwise.core.statistics import check_statistics
from layerwise.core.verbs import quantizer
from layerwise.quantize._grid import by_group, check_grid, storable

OutlierWeights = Literal["int8", "float"]

_BITS = 8
_TOP, _ZERO = 127, 128  # the largest code, less the code of 0.0
_NO_COLUMN = -1

_OPTIONS = {"bits": 8, "group": 0, "symmetric": True, "activation": "int8"}
_SOURCE = "table 1: 13B parameters, vector-wise int8 with and without decomposition"


@dataclass(frozen=True, slots=True)
class Decomposed(Coded):
    """A weight as 8-bit codes, with the columns that meet large inputs beside them.

    Attributes:
        codes: From 1 to 255, 128 for 0.0; 128 in columns that are kept.
        scale: Step of each group, in SCALE_DTYPE.
        columns: Inputs that are not rounded, ascending.
        kept: Their weights, in SCALE_DTYPE; None if those are among the codes.
        group: Inputs per scale.
        symmetric: As it was asked for; every grid is centred on 0.0.
        input_scale: None.
        activation: How the other inputs are rounded.
        notes: What the caller should know.
        bits: 8.
    """

    codes: Integer[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    columns: Integer[Tensor, " outliers"]
    kept: Float[Tensor, "out outliers"] | None
    group: int
    symmetric: bool = True
    input_scale: Float[Tensor, " in"] | None = None
    activation: Activation | None = None
    notes: tuple[str, ...] = ()
    bits: int = _BITS

    @classmethod
    def layout(cls, rows: int, width: int, told: Mapping[str, Any]) -> Layout:
        """Codes, scales, and room for the columns that are kept."""
        room = outlier_room(width, told["columns"])
        made: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (torch.int32, (rows, words(width, _BITS))),
            "scale": (SCALE_DTYPE, (rows, -(-width // told_group(told, width)))),
            "columns": (torch.int32, (room,)),
        }
        if told["outlier_weights"] == "float":
            made["kept"] = (SCALE_DTYPE, (rows, room))
        return made

    def parts(self, told: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those tensors; room that is left is filled with a column that there is not."""
        width = self.codes.shape[1]
        left = (0, outlier_room(width, told["columns"]) - len(self.columns))
        made = {
            "codes": pack(self.codes, _BITS),
            "scale": self.scale,
            "columns": functional.pad(self.columns.int(), left, value=_NO_COLUMN),
        }
        if self.kept is not None:
            made["kept"] = functional.pad(self.kept, left)
        return made

    @classmethod
    def read(
        cls, parts: Mapping[str, Tensor], rows: int, width: int, told: Mapping[str, Any]
    ) -> "Decomposed":
        """What `parts` gave, but for notes and activations."""
        columns = parts["columns"]
        columns = columns[columns != _NO_COLUMN]
        kept = parts["kept"][:, : len(columns)] if "kept" in parts else None
        codes = unpack(parts["codes"], _BITS, width).to(torch.uint8)
        group = told_group(told, width)
        return cls(codes, parts["scale"], columns, kept, group, bool(told["symmetric"]))

    def grid_values(self) -> Float[Tensor, "out in"]:
        """The stored matrix, float32."""
        scale = spread(self.scale.float(), self.group, self.codes.shape[1])
        values = (self.codes.float() - _ZERO) * scale
        if self.kept is not None:
            values[:, self.columns.long()] = self.kept.float()
        return values

    def bits_per_weight(self) -> float:
        """Codes, scales, and the columns that are kept, per weight."""
        stored = self.codes.numel() * _BITS + self.scale.numel() * SCALE_BITS
        stored += len(self.columns) * 32
        if self.kept is not None:
            stored += self.kept.numel() * SCALE_BITS
        return stored / self.codes.numel()

    def answer(self, inputs: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        """A product of whole numbers, and one of floats in the columns that are kept."""
        rounding = self.activation
        if rounding is None:
            return inputs @ self.grid_values().to(inputs.device).T
        columns = self.columns.long().to(inputs.device)
        large = inputs[:, columns]  # (tokens, outliers)
        # Those inputs have no part in the scale of a token.
        codes, step = rounding.codes(inputs.index_fill(1, columns, 0.0))
        zero = middle(self.scale, _BITS)
        rounded = step * integer_product(codes, self.codes, zero, self.scale, self.group)
        return rounded + large @ self._weights().to(inputs.device).T

    def _weights(self) -> Float[Tensor, "out outliers"]:
        """What multiplies the inputs that are not rounded."""
        if self.kept is not None:
            return self.kept.float()
        columns = self.columns.long()
        return (self.codes[:, columns].float() - _ZERO) * self.scale[
            :, columns // self.group
        ].float()


@quantizer(
    Paper("LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", 2022, "2208.07339"),
    claims=(Claim("rtn", "bytes-wikitext-outliers/quantize", _OPTIONS, 0.8, _SOURCE),),
    codes="own",
    widths=(_BITS,),
    stores=Decomposed,
    activates="int8",
)
def llm_int8(
    weight: Float[Tensor, "out in"],
    peak: Float[Tensor, " in"],
    *,
    bits: int = 8,
    group: int = 128,
    symmetric: bool = True,
    threshold: float = 6.0,
    columns: float = 0.05,
    outlier_weights: str = "float",
) -> Decomposed:
    """Round weights and inputs to 8 bits, but for inputs that grow large.

    The inputs O whose magnitude reached `threshold` on the calibration text are multiplied as
    they are; the others, like the weights, are rounded with a scale for each token and each row:

        y = s_x s_w (X_c W_c^T over inputs not in O) + X[:, O] W[:, O]^T           (eq. 8)

        s_x = max over inputs not in O of |x| / 127,    s_w = max |w| / 127

    where the first product is one of whole numbers, and exact.  Unlike the paper, which finds O
    in each batch, ours is fixed: what a token gets does not depend on its neighbours, and the
    weights of O can be kept in 16 bits and leave the scales of rows, as they do by default.  The
    authors' code reads them back from their 8 bits, as `outlier_weights` "int8" does: with very
    large inputs, the error of those is then the largest.  Unlike the authors' code, small entries
    of a column of O are not rounded either.

    Args:
        weight: Layer to quantize.
        peak: Largest |x| of each input over calibration tokens.
        bits: 8; there is no other.
        group: Inputs that share a scale; in the paper it is the whole row.
        symmetric: Store no zero points; grids are centred on 0.0 either way.
        threshold: Magnitude from which an input is large.
        columns: The most inputs that may be kept, as a fraction; of more, the largest are.
        outlier_weights: "float" keeps the weights of large inputs in 16 bits, "int8" rounds them
            like the others.

    Returns:
        Codes, scales, and the columns of O.  A note says how many large inputs had no room.

    Raises:
        UserError: An option is out of range, or a value is NaN or infinite.
    """
    if bits != _BITS:
        raise UserError(f"bits is {bits}.", "Give 8; codes have no other width.")
    if not 0 <= columns <= 1 or not threshold >= 0:
        raise UserError(
            f"columns is {columns}, threshold is {threshold}.",
            "Give a fraction from 0 to 1, and a magnitude of at least 0.",
        )
    if outlier_weights not in get_args(OutlierWeights):
        raise UserError(f"outlier_weights is {outlier_weights!r}.", "Give int8 or float.")
    width = weight.shape[1]
    check_grid(weight, bits, group)
    check_statistics(peak)
    large = int((peak >= threshold).sum())
    room = outlier_room(width, columns)
    chosen = peak.argsort(descending=True, stable=True)[: min(large, room)].sort().values
    values, kept = weight.float(), None
    if outlier_weights == "float":
        kept = values[:, chosen].to(SCALE_DTYPE)
        values = values.index_fill(1, chosen, 0.0)
    grouped = by_group(values, group)  # (out, groups, group)
    scale = storable(grouped.abs().amax(dim=-1) / _TOP)
    codes = (grouped / scale[..., None]).round().clamp(-_TOP, _TOP) + _ZERO
    missing = large - len(chosen)
    return Decomposed(
        codes.flatten(1)[:, :width].to(torch.uint8),
        scale.to(SCALE_DTYPE),
        chosen.int(),
        kept,
        group,
        symmetric,
        activation=Activation("int8"),
        notes=(f"{missing} large inputs had no room and are rounded",) if missing else (),
    )
