"""A broken method for each law of what learns pruned weights anew."""

import torch
from testing.broken import broken

from layerwise.recover.full import full
from layerwise.recover.masklora import masklora


def begins_elsewhere(weight, kept, *, steps=10, rate=1e-3):
    return full(1.001 * weight.float() + 1e-3, kept, steps=steps, rate=rate)


def forgets_the_mask(weight, kept, *, steps=10, rate=1e-3):
    return masklora(weight, torch.ones_like(kept), steps=steps, rate=rate)


def never_learns(weight, kept, *, steps=10, rate=1e-3):
    return full(weight, kept, steps=0, rate=rate)


def always_takes_ten_steps(weight, kept, *, steps=10, rate=1e-3):
    return full(weight, kept, rate=rate)


def clamps_its_numbers(weight, kept, *, steps=10, rate=1e-3):
    return full(weight, kept, steps=max(0, steps), rate=rate if rate > 0 else 1e-3)


BROKEN = {
    "begins_as_the_pruned_weight": broken("recover", begins_elsewhere),
    "what_was_pruned_stays_gone": broken("recover", forgets_the_mask),
    "comes_closer_to_a_weight": broken("recover", never_learns),
    "says_how_it_is_learned": broken("recover", always_takes_ten_steps),
    "refuses_impossible_numbers": broken("recover", clamps_its_numbers),
}
