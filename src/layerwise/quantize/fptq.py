"""FPTQ: 4-bit weights, and 8-bit inputs that are rounded as each layer's range allows."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.activation import Activation
from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.results import Quantized
from layerwise.core.statistics import check_statistics
from layerwise.core.verbs import quantizer
from layerwise.quantize._grid import nearest

_BENCH = "bytes-wikitext-outliers/quantize"
_OPTIONS = {"bits": 4, "group": 64, "symmetric": True}
_SOURCE = "abstract: W4A8 close to FP16 where one scheme for all layers fails, BLOOM and LLaMA"


@quantizer(
    Paper(
        "FPTQ: Fine-grained Post-Training Quantization for Large Language Models",
        2023,
        "2308.15987",
    ),
    claims=(
        Claim("rtn", _BENCH, _OPTIONS | {"activation": "int8-static"}, 0.8, _SOURCE),
        Claim("rtn", _BENCH, _OPTIONS | {"activation": "int8"}, 0.0, _SOURCE),
    ),
    rows="input",
    activates="int8",
)
def fptq(
    weight: Float[Tensor, "out in"],
    peak: Float[Tensor, " in"],
    *,
    bits: int,
    group: int = 128,
    symmetric: bool = True,
    fold: bool = True,
    v0: float = 15.0,
    v1: float = 150.0,
) -> Quantized:
    """Round weights to nearest, and inputs in the cheapest way that their range allows.

    With m_j = max |x_j| over calibration tokens and v = max_j m_j, the inputs of a layer are
    rounded to 8 bits

        v <= v0         with one scale for all tokens, v / 127
        v0 < v < v1     the same, after each input was divided by s_j
        v >= v1         with a scale for each token, max_j |x_j| / 127

    where s evens out the inputs by logarithms, and goes into what feeds the layer:

        s_j = m_j / log2(2 + m_j),    x_j <- x_j / s_j,    W[:, j] <- W[:, j] s_j

    so that the largest magnitudes become log2(2 + m_j).  Weights have no part in s.

    An input that calibration never saw keeps its scale: s_j = 1.  The paper does not say what
    becomes of a layer between v0 and v1 that nothing feeds which can take s; it gets a scale for
    each token.  Unlike the paper, evening out is not kept to layers behind a norm: any that
    something feeds which can take s may be evened out.

    Args:
        weight: All the layers that read one input, stacked by rows.
        peak: Largest |x| of each input over calibration tokens.
        bits: Width of a code, from 1 to 16.
        group: Inputs that share a grid.
        symmetric: Centre every grid on 0.0, so that no zero points are stored.
        fold: Something that feeds the layers can take s.
        v0: Range up to which one scale does for all tokens.
        v1: Range from which each token has a scale.

    Returns:
        Codes of W diag(s), with s as `input_scale` where the inputs are evened out, and how they
        are rounded.

    Raises:
        UserError: An option is out of range, or a value is NaN or infinite.
    """
    if not 0 <= v0 <= v1:
        raise UserError(f"v0 is {v0}, v1 is {v1}.", "Give ranges of at least 0, v0 not above v1.")
    check_statistics(peak)
    largest = float(peak.amax())
    if largest <= v0:
        rounded = nearest(weight, bits, group, symmetric)
        return replace(rounded, activation=Activation.of("int8-static", peak))
    if largest >= v1 or not fold:
        rounded = nearest(weight, bits, group, symmetric)
        return replace(rounded, activation=Activation("int8"))
    scale = (peak / torch.log2(2 + peak)).where(peak > 0, 1.0)
    rounded = nearest(weight.float() * scale, bits, group, symmetric)
    activation = Activation.of("int8-static", peak / scale)
    return replace(rounded, input_scale=scale, activation=activation)
