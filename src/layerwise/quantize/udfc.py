"""UDFC: round each channel, then scale it so that it stands for the whole one best."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.results import SCALE_DTYPE, Quantized
from layerwise.core.verbs import quantizer
from layerwise.quantize._grid import nearest

# Up to here the least-squares scale takes so much off every channel that nets die of it.
_COARSE_BITS = 2


@quantizer(
    Paper(
        "Unified Data-Free Compression: Pruning and Quantization without Fine-Tuning",
        2023,
        "2308.07209",
    ),
    claims=(
        Claim(
            "rtn",
            "stories-char-940k/quantize",
            {"group": 0, "symmetric": True, "bits": 4},
            0.0,
            "abstract: above the best combination of data-free pruning and rounding, ResNet-34",
        ),
    ),
    rows="independent",
)
def udfc(
    weight: Float[Tensor, "out in"], *, bits: int, group: int = 128, symmetric: bool = True
) -> Quantized:
    """Round to nearest, then give each output channel the scale with which it errs least.

    A rounded channel q is taken for the whole one, w, times a number that the next layer absorbs.
    Of the error of the channel's filter and of what is added to it, b in front of the ReLU,

        min  |w - s q|^2 + a1 (b - s b)^2 + a2 s^2
         s

    Here s goes into the channel's own scales instead, which says the same (relu(s z) = s relu(z))
    and leaves the bias, or the batch norm that follows, as it was.  So b is not lost, a1 has
    nothing to weigh, and

        s = q . w / q . q        scale' = s scale

    Unlike the paper, a2 is 0: one number that the data of a channel fix needs no penalty.  Unlike
    the paper, s is 1 at 2 bits or fewer, where s well below 1 compounds from layer to layer.  A
    channel of zeros stays.  What is to be pruned, `--density` leaves out first; whole channels and
    their rebuilding from others, the paper's other half, are not done here.

    Args:
        weight: Layer to quantize.
        bits: Width of a code, from 1 to 16.
        group: Inputs that share a grid; the paper's is the row.
        symmetric: Centre every grid on 0.0, so that no zero points are stored.

    Raises:
        UserError: An option is out of range, or the weight holds NaN or infinity.
    """
    made = nearest(weight, bits, group, symmetric)
    if bits <= _COARSE_BITS:
        return made
    # Of unit size: squares of the widest float32 weights overflow, those of the least vanish.
    size = weight.float().abs().amax(dim=1, keepdim=True)
    size = size.where(size > 0, 1.0)
    rounded, exact = (made.dequantize() / size).double(), (weight.float() / size).double()
    energy = rounded.square().sum(dim=1)
    share = (rounded * exact).sum(dim=1) / energy.where(energy > 0, 1.0)
    share = share.where(share > 0, 1.0)
    scale = (made.scale.double() * share[:, None]).to(SCALE_DTYPE)
    return replace(made, scale=scale.clamp(min=torch.finfo(SCALE_DTYPE).tiny))
