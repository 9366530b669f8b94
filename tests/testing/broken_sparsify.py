"""A broken sparsifier for each law of sparsifiers."""

import torch
from testing.broken import broken

from layerwise.sparsify.teal import teal
from layerwise.sparsify.wina import wina


def keeps_one_in_ten_more(activations, *, density):
    return teal(activations, density=min(1.0, 1.1 * density + 0.02))


def always_drops_the_least(activations, *, density):
    kept = teal(activations, density=density)
    return kept & (activations.abs() > activations.abs().amin(dim=1, keepdim=True))


def keeps_the_least_of_little(activations, *, density):
    small = torch.ones_like(activations) / (1 + activations.abs())
    return teal(small if density < 0.3 else activations, density=density)


def has_a_floor(activations, *, density):
    return teal(activations.where(activations.abs() > 1e-2, 0.0), density=density)


def keeps_what_is_small(activations, columns, *, density):
    return wina(1 / (1 + activations.abs()), columns, density=density)


def one_mask_for_all_tokens(activations, *, density):
    mean = activations.abs().mean(dim=0, keepdim=True)
    return teal(mean, density=density).expand_as(activations)


def clamps_the_density(activations, *, density):
    return teal(activations, density=density if 0 < density <= 1 else 0.5)


BROKEN = {
    "keeps_the_asked_density": broken("sparsify", keeps_one_in_ten_more),
    "full_density_keeps_everything": broken("sparsify", always_drops_the_least),
    "a_higher_density_keeps_what_a_lower_one_does": broken("sparsify", keeps_the_least_of_little),
    "ignores_the_unit_of_its_evidence": broken("sparsify", has_a_floor),
    "what_is_always_zero_goes_first": broken("sparsify", keeps_what_is_small),
    "what_comes_together_is_judged_alone": broken("sparsify", one_mask_for_all_tokens),
    "refuses_an_impossible_density": broken("sparsify", clamps_the_density),
}
