"""A broken allocator for each law of allocators."""

import torch
from testing.broken import broken

from layerwise.allocate.knapsack import knapsack
from layerwise.allocate.threshold import threshold
from layerwise.allocate.uniform import uniform


def counts_levels_from_one(costs, *, budget):
    return uniform(costs, budget=budget) + 1


def rounds_the_budget_up(costs, *, budget):
    return uniform(costs, budget=budget + budget // 10)


def stays_at_the_least(costs, *, budget):
    uniform(costs, budget=budget)
    return torch.zeros(len(costs), dtype=torch.int64)


def first_come_first_served(costs, *, budget):
    return threshold(torch.arange(len(costs), 0, -1).float(), costs, budget=budget)


def ignores_small_errors(errors, costs, *, budget):
    return knapsack([error.round(decimals=3) for error in errors], costs, budget=budget)


def least_important_first(scores, costs, *, budget):
    return threshold(-scores, costs, budget=budget)


def never_reads_the_errors(errors, costs, *, budget):
    return stays_at_the_least(costs, budget=budget)


def does_what_it_can(costs, *, budget):
    return uniform(costs, budget=max(budget, sum(int(cost[0]) for cost in costs)))


def wastes_what_is_too_much(costs, *, budget):
    levels = uniform(costs, budget=budget)
    levels[0] -= int(budget > sum(int(cost[-1]) for cost in costs))
    return levels


BROKEN = {
    "chooses_levels_that_exist": broken("allocate", counts_levels_from_one),
    "never_over_budget": broken("allocate", rounds_the_budget_up),
    "leaves_no_whole_level_unspent": broken("allocate", stays_at_the_least),
    "ignores_the_order_of_items": broken("allocate", first_come_first_served),
    "ignores_the_unit_of_its_evidence": broken("allocate", ignores_small_errors),
    "a_higher_score_never_gets_less": broken("allocate", least_important_first),
    "errs_no_more_than_one_level_for_all": broken("allocate", never_reads_the_errors),
    "lowers_none_for_more": broken("allocate", wastes_what_is_too_much, nested=True),
    "refuses_the_impossible": broken("allocate", does_what_it_can),
}
