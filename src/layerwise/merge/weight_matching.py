"""Weight matching: permute networks until their weights are alike, then average them."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.merging.matching import matched, permuted
from layerwise.core.reading.symmetry import Symmetry
from layerwise.core.verbs import merger
from layerwise.merge._states import Made


@merger(
    Paper(
        "Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching", 2024,
        "2402.04051",
    ),
    claims=(
        Claim("linear", "digits-twins-barrier/merge", {"width": 256}, 0.85,
              "card 083: a barrier of at most 0.15 of that before"),
        Claim("linear", "digits-twins-barrier/merge", {"width": 64}, 0.85,
              "card 083: wider is easier; 0.04 at a width of 64"),
    ),
    exempt={
        "ignores_the_order_of_models": "units take the places that they have in the first model; "
        "another first gives the same function of another order of units, or a nearby one"
    },
)  # fmt: skip
def weight_matching(
    networks: Sequence[Mapping[str, Tensor]],
    symmetries: Sequence[Symmetry],
    *,
    seed: int = 0,
) -> Mapping[str, Tensor]:
    """Average networks after each but the first is permuted to be like the first.

    A network stays the same function when its hidden units change places.  For each model k the
    permutations are looked for that make

        sum over tensors of <W_1, pi_k(W_k)>

    large, one set of units after the other by linear assignment, with the others as they are; then

        W = mean_k pi_k(W_k)

    Networks that were trained apart lie behind a barrier before, and often not after.  What counts
    for that, the paper finds, is that directions of large singular values come to lie alike, and
    not that the distance shrinks, which it hardly does; `lw.connect` tells all three.  A network
    with batch norms needs its statistics taken anew afterwards (`norms`): the mean of two units
    varies less than either, as far as they do not agree.

    Args:
        networks: Tensors of every network by name.
        symmetries: Which units can change places.
        seed: Draws another order in which sets of units are gone through.
    """
    first = networks[0]
    orders = [matched(first, state, symmetries, seed) for state in networks[1:]]

    def merged(name: str) -> Tensor:
        total = first[name].clone()
        for state, found in zip(networks[1:], orders, strict=True):
            total += (permuted(name, state[name], symmetries, found) - first[name]).div_(
                len(networks)
            )
        return total

    return Made(list(first), merged)
