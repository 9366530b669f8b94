"""Differences from a base of which entries are dropped at random."""

from collections.abc import Sequence

from jaxtyping import Float, Int64
from torch import Tensor

from layerwise.core.merging.noise import uniform
from layerwise.merge._differences import densities


def dropped(
    models: Float[Tensor, "models ..."],
    base: Float[Tensor, "..."],
    entries: Int64[Tensor, "..."],
    seeds: Sequence[int],
    density: float | Sequence[float],
    seed: int,
    rescale: bool,
) -> list[Float[Tensor, "..."]]:
    """Each model's difference from the base, with entries kept with a probability of `density`."""
    made: list[Tensor] = []
    for model, key, kept in zip(models, seeds, densities(density, len(models)), strict=True):
        difference = model - base
        if kept < 1:
            difference *= uniform(entries, key, seed) < kept
            if rescale and kept:
                difference /= kept
        made.append(difference)
    return made
