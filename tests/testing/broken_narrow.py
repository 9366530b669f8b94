"""A broken method for each law of what takes out units."""

from dataclasses import replace

import torch
from testing.broken import broken

from layerwise.narrow.magnitude import magnitude


def may_keep_none(weight, *, density, units):
    cut = magnitude(weight, density=density, units=units)
    return replace(cut, kept=cut.kept & (round(density * units) > 0))


def keeps_the_first(weight, *, density, units):
    cut = magnitude(weight, density=density, units=units)
    return replace(cut, kept=torch.arange(units) < cut.kept.sum())


def scores_what_stays_only(weight, *, density, units):
    cut = magnitude(weight, density=density, units=units)
    return replace(cut, scores=cut.scores.where(cut.kept, 0.0))


def always_makes_up(weight, *, density, units):
    return replace(magnitude(weight, density=density, units=units), bias=torch.ones(len(weight)))


def leaves_the_columns(weight, *, density, units):
    return replace(magnitude(weight, density=density, units=units), weight=weight.float())


def likes_late_units(weight, *, density, units):
    late = torch.linspace(1, 2, weight.shape[1])
    return magnitude(weight.float() * late, density=density, units=units)


def has_a_floor(weight, *, density, units):
    return magnitude(weight.where(weight.abs() > 1e-3, 0.0), density=density, units=units)


def counts_what_makes_them(weight, filters, *, density, units):
    return magnitude(filters.T.contiguous(), density=density, units=units)


def clamps_the_density(weight, *, density, units):
    density = density if 0 < density <= 1 else 0.5
    units = units if units and weight.shape[1] % units == 0 else 1
    return magnitude(weight, density=density, units=units)


BROKEN = {
    "keeps_as_many_units_as_asked": broken("narrow", may_keep_none),
    "the_highest_scores_stay": broken("narrow", keeps_the_first),
    "scores_do_not_hang_on_the_density": broken("narrow", scores_what_stays_only),
    "full_density_changes_nothing": broken("narrow", always_makes_up),
    "what_goes_is_not_read": broken("narrow", leaves_the_columns),
    "the_order_of_units_does_not_matter": broken("narrow", likes_late_units),
    "ignores_the_unit_of_the_weights": broken("narrow", has_a_floor),
    "what_nobody_reads_goes_first": broken("narrow", counts_what_makes_them),
    "refuses_an_impossible_density": broken("narrow", clamps_the_density),
}
