"""A broken pruner for each law of pruners."""

from testing.broken import broken

from layerwise.core.results import Pruned
from layerwise.prune.magnitude import magnitude


def removes_one_in_a_hundred_more(weight, *, density):
    return magnitude(weight, density=0.99 * density)


def only_marks(weight, *, density):
    return Pruned(magnitude(weight, density=density).kept, weight.float())


def always_removes_the_least(weight, *, density):
    kept = weight.abs() > weight.abs().amin()
    return Pruned(kept, weight.float().where(kept, 0.0))


def halves_what_stays(weight, *, density):
    pruned = magnitude(weight, density=density)
    return Pruned(pruned.kept, pruned.weight / 2)


def has_a_floor(weight, *, density):
    return magnitude(weight.where(weight.abs() > 1e-3, 0.0), density=density)


def never_looks_at_its_inputs(weight, gram, *, density):
    return magnitude(weight, density=density)


def clamps_the_density(weight, *, density):
    density = density if 0 < density <= 1 else 0.5
    return magnitude(weight, density=density)


BROKEN = {
    "keeps_the_asked_density": broken("prune", removes_one_in_a_hundred_more),
    "removed_is_zero": broken("prune", only_marks),
    "full_density_changes_nothing": broken("prune", always_removes_the_least),
    "pruning_again_changes_nothing": broken("prune", halves_what_stays),
    "a_higher_density_never_hurts": broken("prune", always_removes_the_least),
    "ignores_the_unit_of_the_weights": broken("prune", has_a_floor),
    "a_dead_input_goes_first": broken("prune", never_looks_at_its_inputs),
    "refuses_an_impossible_density": broken("prune", clamps_the_density),
}
