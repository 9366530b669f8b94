"""RSQ: error feedback, with tokens weighed by the attention that they receive."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.results import Quantized
from layerwise.core.statistics import check_statistics
from layerwise.core.symmetric import add_squares, mirror
from layerwise.core.verbs import quantizer
from layerwise.quantize._feedback import round_evenly

_SOURCE = "abstract: less loss than uniform tokens at 3 bits, LLaMA3, Mistral and Qwen-2.5"


@quantizer(
    Paper("RSQ: Learning from Important Tokens Leads to Better Quantized LLMs", 2025, "2503.01820"),
    claims=(
        Claim("gptq", "bytes-wikitext/quantize", {"bits": 3, "group": 0}, 0.0, _SOURCE),
        Claim(
            "gptq",
            "reference-6m/quantize",
            {"bits": 3, "group": 0, "symmetric": True},
            0.0,
            _SOURCE,
        ),
    ),
    exempt={"pruned_weights_stay_zero": "a zero moves to absorb the errors of its row"},
    rows="independent",
)
def rsq(
    weight: Float[Tensor, "out in"],
    inputs: Float[Tensor, "tokens in"],
    attention: Float[Tensor, "windows length"],
    *,
    bits: int,
    group: int = 128,
    symmetric: bool = False,
    r_min: float = 0.005,
    power: int = 1,
    damping: float = 0.01,
    clips: int = 25,
) -> Quantized:
    """Round as GPTQ does, to answer best for the tokens that others attend to.

    A token's importance is the attention that it receives, summed over the heads and queries of
    its block, and brought to a range that is the same in every window:

        r_j = sum over heads and queries of A[h, q, j]
        r_j <- r_min + (1 - r_min) (r_j - min r) / (max r - min r)

    The second moments that quantize/gptq goes by are then weighed, with the mean weight at 1:

        H = mean of r_j^power x_j x_j^T

    The authors' code has a power of 1; the paper's loss, |(W - W') X diag(r)|^2, one of 2.  A
    window whose tokens receive alike counts each as 1.  Unlike the paper, we do not rotate the
    model here, or show it shifted copies of the calibration text: the first is a step for the
    whole model, the second a matter of the text.

    Args:
        weight: Layer to quantize.
        inputs: What the layer saw, token by token.
        attention: What each of those tokens received, window after window.
        bits: Width of a code, from 1 to 16.
        group: Inputs that share a grid.
        symmetric: Centre every grid on 0.0, so that no zero points are stored.
        r_min: Importance of the least important token of a window, from 0 to 1; the most
            important one has 1.
        power: Of the importance in the second moments, 1 or 2.
        damping: Added to the diagonal, as a fraction of its mean over live inputs.
        clips: Ranges to try for each grid: 100%, 99%, 98% ... of the whole.

    Returns:
        Codes and grids.  Notes say if tokens all counted alike because the layer, an expert, saw
        only some of those of the attention.

    Raises:
        UserError: An option is out of range, a value is NaN or infinite, or H does not factor.
    """
    if not 0 <= r_min <= 1 or power not in (1, 2):
        raise UserError(
            f"r_min is {r_min}, power is {power}.", "Give r_min from 0 to 1, power 1 or 2."
        )
    check_statistics(inputs, attention)
    seen, notes = inputs.float(), ()
    if len(inputs) == attention.numel():
        seen = seen * _importance(attention.float(), r_min, power).sqrt()[:, None]
    else:
        notes = (f"it saw {len(inputs)} of {attention.numel()} tokens; each counts alike",)
    gram = torch.zeros(seen.shape[1], seen.shape[1])
    add_squares(gram, seen)
    mirror(gram.div_(max(len(seen), 1)))
    rounded = round_evenly(
        weight,
        gram,
        bits=bits,
        group=group,
        symmetric=symmetric,
        damping=damping,
        clips=clips,
    )
    return replace(rounded, notes=rounded.notes + notes)


def _importance(
    attention: Float[Tensor, "windows length"], r_min: float, power: int
) -> Float[Tensor, " tokens"]:
    """The weight of each token, with a mean of 1."""
    least, most = attention.amin(dim=1, keepdim=True), attention.amax(dim=1, keepdim=True)
    spread = most - least
    # Where all receive alike, none is above another.
    place = ((attention - least) / spread.where(spread > 0, 1.0)).where(spread > 0, 1.0)
    weight = (r_min + (1 - r_min) * place).pow(power).flatten()
    return weight / weight.mean()
