"""Robust weight signatures: what corrupted pictures change in the first layers, added on."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.errors import UserError
from layerwise.core.merging.signatures import kept_tensors, taken
from layerwise.core.verbs import merger
from layerwise.merge._differences import share_of_all
from layerwise.merge._states import Made


@merger(
    Paper("Robust Weight Signatures: Gaining Robustness as Easy as Patching Weights?", 2023,
          "2302.12480"),
    claims=(
        Claim("clean", "digits-corrupted/merge", {"kind": "contrast", "layers": 1}, 0.59,
              "card 043: 40 points more of pictures with less contrast"),
        Claim("clean", "digits-corrupted/merge", {"kind": "blur", "layers": 1}, 0.46,
              "card 043: 15 points more of blurred pictures"),
        Claim("clean", "digits-corrupted/merge", {"kind": "noise", "layers": 1}, 0.1,
              "card 043: 4 points more of pictures with noise"),
    ),
)  # fmt: skip
def rws(
    networks: Sequence[Mapping[str, Tensor]],
    origin: Mapping[str, Tensor],
    shares: Float[Tensor, " models"],
    first: int,
    *,
    layers: int = 0,
    pattern: str = "",
    scale: float = 1.0,
    normalize: bool = True,
) -> Mapping[str, Tensor]:
    """Add to a network tuned to clean data what others learned of corrupted data.

    The model given first was tuned to clean data, each other one to a corruption c, all from one
    origin W_0.  For each tensor of the first layers, flat,

        a     = W_clean - W_0
        d_c   = W_c - W_0
        RWS_c = d_c - a <a, d_c> / <a, a>
        W     = W_clean + scale sum_c s_c RWS_c

    Other layers are those of the clean model.  A layer that clean data did not change has a = 0,
    and nothing is taken away.  Tensors of batch norms in all layers go from the clean model's to
    the corrupted ones': W_clean + scale sum_c s_c (W_c - W_clean), and their statistics should then
    be taken anew on corrupted data.  Other norms stay as they are.  `layerwise signature` keeps
    RWS_c in a small file, which patches any model of the same origin.

    Unlike the official code, which multiplies several corruptions by their share before and after
    the projection, this does it once.

    Args:
        networks: Tensors of every tuned model by name.
        origin: Those of the model they were tuned from.
        shares: How much each corruption counts; that of the clean model is not read.
        first: Which of the models is the clean one.
        layers: How many layers, from the shallowest, are changed; 0 for half of them, rounded up:
            the official code's 7 of the 13 of VGG-16.
        pattern: Which tensors are changed instead, as in `conv1.*`.
        scale: Times all that is added; below 1 less of it.
        normalize: Take the shares of the corruptions as fractions of their sum.

    Raises:
        UserError: There is no corrupted model, there are not so many layers, no tensor has such a
            name, or the shares add up to nothing.
    """
    others = [place for place in range(len(networks)) if place != first]
    if not others:
        raise UserError(
            "merge/rws adds what other models learned to the first, and there is no other.",
            "Give the clean model, then one or more that were tuned to corrupted data.",
        )
    clean = networks[first]
    counted = share_of_all(shares[torch.tensor(others)], normalize).tolist()
    shapes = {name: tuple(one.shape) for name, one in origin.items()}
    changed = frozenset(kept_tensors(shapes, layers, pattern))

    def patched(name: str) -> Tensor:
        found = clean[name].float()
        if name not in changed:
            return found.clone()
        total = torch.zeros_like(found)
        for place, share in zip(others, counted, strict=True):
            total += taken(name, origin, clean, networks[place]).mul_(share)
        return total.mul_(scale).add_(found)

    return Made(list(clean), patched)
