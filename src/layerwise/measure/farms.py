"""FARMS: the heavy-tail exponent of windows of one shape, so that layers of all shapes compare."""

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import measure
from layerwise.measure._spectrum import Start, eigenvalues, heaviness

_SOURCE = "abstract: perplexity of LLaMA-7B 17.3% below the previous best, which goes by alpha"
_OPTIONS = {"allow": {"bits": (2, 4)}, "budget": "3.8bits"}


@measure(
    Paper(
        "Eigenspectrum Analysis of Neural Networks without Aspect Ratio Bias",
        2025,
        "2506.06280",
    ),
    claims=(Claim("alpha", "reference-6m/measure", _OPTIONS, 0.05, _SOURCE),),
)
def farms(
    weight: Float[Tensor, "out in"],
    *,
    window: int = 2000,
    ratio: float = 1.0,
    windows: int = 15,
    start: Start = "peak",
) -> float:
    """Score a layer by the heavy-tail exponent of windows that all have one aspect ratio.

    The eigenvalues of W^T W spread with the ratio of the layer's sides even if W is noise, so
    alpha tells a 4096 x 4096 layer from a 4096 x 11008 one that learned as much.  Windows of m
    rows and Q m columns, Q the same for all layers, do not.  Of the matrix (R, C), turned so
    that C >= R, with k windows each way:

        m    = min(window, R, floor(C / Q))
        row  = i * max(1, floor((R - m) / (k - 1))) ,      i < k , at most R - m
        col  = j * max(1, floor((C - Q m) / (k - 1))) ,    j < k , at most C - Q m

    The eigenvalues of all windows are pooled, and alpha is fitted to their tail as the measure
    `alpha` does.

    Unlike the paper, the score is -alpha, so that higher is more important, and 0 eigenvalues are
    dropped.  Unlike the authors' code, the layer is turned and m kept so small that no window is
    cut off at the edge; windows at one place count once; and the lower bound of "peak" is 0.95 of
    the mode and not the logarithm of that, so that alpha does not change when a layer is rescaled.
    For pictures the authors average alpha over windows of each position of a kernel; here a
    convolution is one matrix.  Windows overlap, so the tail's distance from its law is no test.

    As in the paper's work on language models, `window` is large: each window takes the time that
    `alpha` takes for a layer of that width, and there are up to `windows`^2.

    Args:
        weight: The layer.
        window: Rows of a window.
        ratio: Columns of a window for each of its rows, Q.
        windows: Windows along each side.
        start: Where the tail starts: "ks", "mid" or "peak", as in `alpha`.

    Returns:
        -alpha, from -100 (no tail) to -1; higher is heavier and more important.

    Raises:
        UserError: A window would have no rows or columns, or there would be none.
    """
    if window < 1 or windows < 1 or not ratio > 0:
        raise UserError(
            f"{windows} windows of {window} rows and {ratio} columns for each are asked for.",
            "Give one window or more, of one row or more, and a ratio above 0.",
        )
    wide = weight if weight.shape[1] >= len(weight) else weight.T
    rows = max(1, min(window, len(wide), int(wide.shape[1] / ratio)))
    columns = min(max(1, int(rows * ratio)), wide.shape[1])
    spectra = [
        eigenvalues(wide[top : top + rows, left : left + columns])
        for top in _places(len(wide) - rows, windows)
        for left in _places(wide.shape[1] - columns, windows)
    ]
    return heaviness(torch.cat(spectra).sort().values, start)


def _places(last: int, windows: int) -> list[int]:
    """Where windows start along a side, none twice; `last` is as far as one may."""
    step = max(1, last // max(1, windows - 1))
    return sorted({min(number * step, last) for number in range(windows)})
