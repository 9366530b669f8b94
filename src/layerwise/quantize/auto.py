"""Auto: the best of a short list for each layer, then learned from there."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core import catalogue
from layerwise.core.catalogue import Claim, Paper
from layerwise.core.learning import OutputError, Schedule, learned_alone
from layerwise.core.results import Coded, Quantized
from layerwise.core.statistics import check_statistics
from layerwise.core.verbs import quantizer
from layerwise.quantize._grid import by_group, check_grid, stored
from layerwise.quantize._rounding import Rounded, check_schedule

# From here on so little is lost that nothing is worth learning.
_FINE_BITS = 8
# The largest energy of an input, in means of all, from which the order of rounding matters.
_UNEVEN = 10.0
# A weight that the short list rounded to another point than the nearest keeps this far from where
# it would go back: less than half a step, so that it starts where it was left.
_INSIDE = 0.49
# How far an update moves a weight at first, in steps of its grid.
_RATE = 0.01
# The same of a step of 2 bits, as a share of it; one of a bit more is moved by a quarter.
_SHARE_RATE = 0.005
# What a grid's step may become, as a share of what it was.
_SHARES = 0.5, 1.5


class Auto(Rounded):
    """A layer that starts from its best candidate; the arguments are those of `auto`."""

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        gram: Float[Tensor, "in in"],
        *,
        bits: int,
        group: int = 128,
        symmetric: bool = False,
        steps: int = 100,
        batch: int = 4,
    ) -> None:
        check_schedule(steps, batch)
        self.start, self.note = _best(weight, gram, bits, group, symmetric)
        self.scale, self.zero = self.start.scale.float(), self.start.zero.float()
        codes = by_group(self.start.codes.float(), group) - self.zero[..., None]
        exact = by_group(weight, group) / self.scale[..., None]
        super().__init__(
            (codes + (exact - codes).clamp(-_INSIDE, _INSIDE)) * self.scale[..., None],
            weight.shape[1],
            bits=bits,
            group=group,
            symmetric=symmetric,
            schedule=Schedule(0 if bits >= _FINE_BITS else steps, batch),
        )
        self.moves = torch.zeros_like(exact).requires_grad_()
        self.shares = torch.ones_like(self.scale).requires_grad_()

    def parameters(self) -> dict[float, list[Tensor]]:
        """The move of each weight, in steps of its grid, and a share of each step."""
        return {_RATE: [self.moves], _SHARE_RATE / 4 ** (self.bits - 2): [self.shares]}

    def settle(self) -> None:
        """A step stays near what it was."""
        with torch.no_grad():
            self.shares.clamp_(*_SHARES)

    def grid(self) -> tuple[Tensor, Tensor]:
        """The candidate's grid, with a share of its step."""
        return stored(self.scale * self.shares), self.zero

    def steps(self, scale: Float[Tensor, "out groups"]) -> Float[Tensor, "out groups _"]:
        """Each weight in steps of its grid, moved."""
        return self.grouped / scale[..., None] + self.moves

    def coded(self) -> Quantized:
        """The present codes, with a note of what they started from."""
        made = super().coded()
        same = torch.equal(made.codes, self.start.codes) and torch.equal(
            made.scale, self.start.scale
        )
        return self.start if same else _noted(made, f"{self.note}, then learned")


@quantizer(
    Paper("layerwise", 2026),
    claims=(
        Claim(
            "gptq",
            "stories-char-940k/quantize",
            {"group": 32, "symmetric": True, "bits": 3},
            0.2,
            "ours: the best of a short list, learned on",
        ),
        Claim(
            "signround",
            "stories-char-940k/quantize",
            {"group": 32, "symmetric": True, "bits": 3},
            0.0,
            "ours: beats each single method at 3 bits",
        ),
        Claim(
            "flexround",
            "stories-char-940k/quantize",
            {"group": 32, "symmetric": True, "bits": 3},
            0.0,
            "ours: beats each single method at 3 bits",
        ),
        Claim(
            "flexround",
            "bytes-wikitext/quantize",
            {"group": 0, "bits": 3},
            0.0,
            "ours: beats each single method at 3 bits",
        ),
    ),
    exempt={"pruned_weights_stay_zero": "a zero moves to absorb the errors of its row"},
    learns=Auto,
    unit="block",
)
def auto(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    bits: int,
    group: int = 128,
    symmetric: bool = False,
    steps: int = 100,
    batch: int = 4,
) -> Coded:
    """Try what suits a layer, keep the best of it, and learn the rounding from there.

    The short list goes by what the data shows: rounding to nearest for a layer that no token
    reached; else GPTQ, in the order of the inputs' energies, too, where one of them has 10 times
    the mean.  The candidate that loses least of the layer's output is kept.  Its codes c, steps s
    and zero points z are then learned on,

        code = clamp(round(v / (a s) + u) + z, 0, 2^bits - 1)
        Q(w) = a s (code - z)

    where v is w, moved no further from s (c - z) than half a step, so that learning starts from c;
    u, one for each weight and unbounded, and a, one for each grid, are moved by Adam, with rates
    that fall along a cosine and rounding that passes gradients on as they come.  What is minimized
    is the error of the block's answer, all of its layers learned together, where a model runs block
    by block; for one layer alone it is the error of its output.  The best parameters on windows
    that no step saw are kept.  All candidates take the same bytes.  Nothing is learned from 8 bits
    on.

    Args:
        weight: Layer to quantize.
        gram: Mean of x x^T over calibration tokens.
        bits: Width of a code, from 1 to 16.
        group: Inputs that share a grid.
        symmetric: Centre every grid on 0.0, so that no zero points are stored.
        steps: Updates; 0 keeps the candidate.
        batch: Windows that each update sees, where a block's layers are learned together.

    Returns:
        Codes and grids.  A note says which candidate won, and whether learning went further.

    Raises:
        UserError: An option is out of range, or a value is NaN or infinite.
    """
    check_statistics(gram)
    layer = Auto(
        weight, gram, bits=bits, group=group, symmetric=symmetric, steps=steps, batch=batch
    )
    return learned_alone(layer, weight, gram)


def _best(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    bits: int,
    group: int,
    symmetric: bool,
) -> tuple[Quantized, str]:
    """The candidate that loses least of the layer's output, and its name."""
    check_grid(weight, bits, group)
    problem = OutputError(weight.float(), gram.float())
    best: tuple[float, Quantized, str] | None = None
    for name, options in _short_list(gram):
        method = catalogue.get(f"quantize/{name}")
        given = {"gram": gram} if "gram" in method.evidence else {}
        made = method.run(
            weight=weight, **given, bits=bits, group=group, symmetric=symmetric, **options
        )
        lost = problem.judged([made.dequantize()])
        if best is None or lost < best[0]:
            said = " ".join([name, *options])
            best = (lost, _noted(made, said), said)
    assert best is not None
    return best[1], best[2]


def _short_list(gram: Float[Tensor, "in in"]) -> Iterator[tuple[str, dict[str, Any]]]:
    energy = gram.diagonal()
    if not bool((energy > 0).any()):
        yield "rtn", {}
        return
    yield "gptq", {}
    if float(energy.max()) > _UNEVEN * float(energy.mean()):
        yield "gptq", {"act_order": True}


def _noted(made: Quantized, note: str) -> Quantized:
    return replace(made, notes=(*made.notes, note))
