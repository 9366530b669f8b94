"""GPTQ: round input by input, and let the inputs to come absorb each rounding error."""

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.results import Quantized
from layerwise.core.verbs import quantizer
from layerwise.quantize._feedback import round_evenly

_SOURCE = "table in the authors' README: LLaMA-7B at 4 bits, and at 3 bits in groups of 128"
_SYMMETRIC = {"group": 32, "symmetric": True}


@quantizer(
    Paper(
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        2022,
        "2210.17323",
    ),
    claims=(
        Claim("rtn", "bytes-wikitext/quantize", {"bits": 3, "group": 64}, 0.5, _SOURCE),
        Claim("rtn", "stories-char-940k/quantize", _SYMMETRIC | {"bits": 4}, 0.5, _SOURCE),
        Claim("rtn", "reference-6m/quantize", _SYMMETRIC | {"bits": 3}, 0.5, _SOURCE),
        Claim("rtn", "builtin-tiny/quantize", _SYMMETRIC | {"bits": 3}, 0.5, _SOURCE),
    ),
    exempt={"pruned_weights_stay_zero": "a zero moves to absorb the errors of its row"},
    rows="independent",
)
def gptq(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    bits: int,
    group: int = 128,
    symmetric: bool = False,
    damping: float = 0.01,
    act_order: bool = False,
    clips: int = 25,
) -> Quantized:
    """Round one input after another, moving each error onto the inputs not yet rounded.

    Rounding column j of W leaves an error in the layer's output.  The best that the columns
    after j can do about it is known in closed form from the inputs' second moments H:

        e_j = (w_j - quant(w_j)) / U_jj
        W[:, k] -= e_j U_jk                for every k > j                        (eq. 2)

    where U is the upper Cholesky factor of H^-1 = U^T U (algorithm 1) and H is the gram matrix
    plus `damping` times the mean of its diagonal over live inputs.  The loss that is left is the
    sum of e_j^2.  No inverse is needed: with R upper triangular and H = R R^T, U = R^-1, and all
    that reaches column k is the sum of (W_j - quant(w_j)) R_jk / R_kk over j < k, W as given.

    Unlike the authors' code, a grid is fitted to all corrections made so far, so that nothing
    depends on how columns are blocked; and its range is the one that loses least when columns
    weigh R_jj^2, as they do in the loss.  Unlike the authors' code, weights of an input that
    calibration never saw are rounded to nearest, not set to zero.  Unlike the authors' code, which
    sets the diagonal of dead inputs to 1 before it takes the mean, they have no part in the mean.

    Args:
        weight: Layer to quantize.
        gram: Mean of x x^T over calibration tokens.
        bits: Width of a code, from 1 to 16.
        group: Inputs that share a grid.
        symmetric: Centre every grid on 0.0, so that no zero points are stored.
        damping: Added to the diagonal, as a fraction of its mean over live inputs; ten times
            more, and a note, as often as H does not factor.
        act_order: Take inputs with the most energy first.  Grids are then fitted to the weights
            as given, so that every group is still made of consecutive inputs.
        clips: Ranges to try for each grid: 100%, 99%, 98% ... of the whole.

    Returns:
        Codes and grids.  Notes say how many inputs were dead and where damping was raised.

    Raises:
        UserError: An option is out of range, a value is NaN or infinite, or H does not factor.
    """
    return round_evenly(
        weight,
        gram,
        bits=bits,
        group=group,
        symmetric=symmetric,
        damping=damping,
        act_order=act_order,
        clips=clips,
    )
